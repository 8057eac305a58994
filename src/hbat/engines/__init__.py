"""How one model trains on one process or several: each engine is a subclass of `Engine`.

`engine` has the interface, and its base class is one process or DDP; `fsdp2`, `loaded_shards` and `deepspeed`
override it. PPO shards its models in `ppo/engine.py`. `choose` finds the engine of a run; other wings ask only
whether a model or tensor is sharded. `checks` refuses what is untested, with the messages of `refusals`. `patches`
has every patch on a trainer, `sharded` the helpers for DTensors, `processes` rank, barrier and broadcast,
`environment` what transformers and accelerate keep for a process.
"""
