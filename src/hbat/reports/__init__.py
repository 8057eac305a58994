"""What a run reports.

`reporter`: live, to the log, the reporters and the progress bar. `log`: the log file. `matrix`: the table of scores
and what it says; `scores`: when they are taken and where they go; `plots`: its picture. `front`: scores along the last
stage. `card`: the model card.
"""
