"""What a run reports: live (`reporter`), as files (`log`, `scores`, `plots`, `card`), and its table (`matrix`)."""
