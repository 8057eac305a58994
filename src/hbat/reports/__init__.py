"""What a run reports: live (`reporter`), as files (`log`, `scores`, `plots`, `card`), and what scores say (`matrix`)."""
