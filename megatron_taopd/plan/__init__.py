"""Know before you queue: memory and time of a run, from config.json alone (docs/plan.md).

setup      what a configuration says about a run, as numbers
shapes     parameters of a rank, Megatron's buffers, the optimizer's shares
memory     bytes by rank and phase: what is alive, and what makes the peak
links      bytes of every collective
collectives  every call of a step: how often, over which ranks (docs/scaling.md)
time       seconds by phase, from operations and bytes
colocated  the caches of servers that share devices with ranks
cluster    what the devices and links can do, and how much of it is attained
propose    layouts that fit, by estimated step time
"""
