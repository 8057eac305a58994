"""What a run reports.

While it trains: `reporter` the log and the reporters, `progress` what a person sees, `tables` rows in trackers,
`costs` what stages took, `log` the log file, `matrix` the table of scores and what it says, `scores` when they are
taken and where they go. Afterwards: `record` a run as its folder holds it, `front` scores along the last stage,
`page` and `comparison` one run or several as HTML (`templates/`) with the pictures of `plots`, `card` the model card.
`files`: the names of all these in a run's folder.
"""
