"""Composer in ComfyUI: conditionings with compositions, and what consumes single representations today."""
