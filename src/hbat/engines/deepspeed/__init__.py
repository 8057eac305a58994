"""DeepSpeed ZeRO-1, -2 and -3. `flat`, `zero12` and `zero3` use private names of DeepSpeed 0.19."""
