"""The command line.

`main` has the commands, `options` their options and help; `run_file` and `eval_file` what a YAML file may hold, read
by `yaml`. `build` makes a trainer of a run file, with `reward_functions`; `hub` uploads it, `summary` prints its
results and `status` where it is, as `output` prints. `init` begins a run file, `migrate` makes one of other tools'
(`peers`). `evaluate` measures models, `sweep` trains many runs, `env` describes the machine, `demo` is the demo.
"""
