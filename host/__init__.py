"""Connects the pack to ComfyUI, its host. No package below this one imports ComfyUI."""
