"""W2W++ for ComfyUI: identities as points in a space of LoRA weights.

Nothing is imported until the host asks for the nodes, so that this file can also be collected by pytest or read by
tools that have no ComfyUI.
"""

WEB_DIRECTORY = "./web"  # web/docs/<node id>.md are the help pages of the nodes


async def comfy_entrypoint():
    from .nodes import W2WExtension

    return W2WExtension()
