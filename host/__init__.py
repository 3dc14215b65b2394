"""The only wall to ComfyUI below the nodes."""
