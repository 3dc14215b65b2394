"""Train Shapeland's models: `python -m training.shapeland STAGE`, the same on a CPU and a GPU.

Stages, in the order in which each needs the one before: scenes, autoencoder, clip, judge, latents, unet. Every stage is
deterministic by seed, keeps its checkpoint, loss log and samples in `runs/shapeland/`, and continues where it stopped.
"""
