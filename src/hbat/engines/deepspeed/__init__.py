"""DeepSpeed ZeRO-1, -2 and -3. `flat`, `zero12` and `zero3` use private names of DeepSpeed 0.19.

`engine` is the engine. `request` reads what the user asks for; `zero12` and `zero3` reach weights and gradients,
`flat` those that lie in one tensor, `bf16` the float32 weights beside those in bfloat16.
"""
