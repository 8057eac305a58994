"""What a run reports.

While it trains: `reporter` the log and the reporters, `progress` what a person sees, `tables` rows in trackers,
`costs` what stages took, `log` the log file, `matrix` the table of scores and what it says, `scores` when they are
taken and where they go. Afterwards: `record` a run as its folder holds it, `front` scores along the last stage,
`page` and `comparison` one run or several as HTML (`templates/`), `card` the model card. `plots` draws their pictures
and the PNG files: those of a run's scores and front, of measured models and of sweeps. `files`: the names of all
these.
"""
