"""What all tests share: the name `conceptloom`, the host in this process, and a real server."""

import asyncio
import json
import os
import shutil
import struct
import sys
import threading
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))

from hostserver import HostServer, Picture  # noqa: E402
from run import alias_pack, open_host  # noqa: E402
from templates import STAND_INS  # noqa: E402

alias_pack()

PROGRESS_TEXT = 3
"""Kind of the websocket's binary frames with a text for a node."""

ONE_OF_SEVERAL = "PYTEST_XDIST_WORKER" in os.environ
if ONE_OF_SEVERAL:
    # Also for what tests start: threads of processes that share processors spend their time waiting for each other.
    os.environ["OMP_NUM_THREADS"] = "1"


SERVED = (
    "test_browser",
    "test_workflows",
    "test_workflow_tools",
    "test_composer_operations",
    "test_server",
    "test_true_models",
    "test_refusals",
    "test_advice",
)
"""Files whose tests run on the real server, in this order: true models empty its cache, so they come late; short files
come last, so that the other process waits little."""
LONG = (
    "test_training_fastcomposer",
    "test_fusion",
    "test_freecustom_composition",
    "test_shapeland_training",
    "test_fastcomposer",
    "test_freecustom_model",
    "test_concept_training",
    "test_promptnet_finetuning",
    "test_inversion",
    "test_composer",
    "test_evaluation_bench",
    "test_training_composer",
    "test_fusion_guider",
    "test_plugandplay",
    "test_training_promptnet",
    "test_training_data",
    "test_evaluation_report",
    "test_evaluation_profusion",
)
"""Files of the others that take longest, so that the last ones are short."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """Of the processes that share the suite, one has the server, so that no template is drawn twice; everything else is
    distributed file by file."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = Path(nodeid.split("::")[0])
            return "the server" if file.stem in SERVED else str(file)

    return ByFile(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the slowest tests first."""
    if ONE_OF_SEVERAL:
        order = {name: place for place, name in enumerate((*SERVED, *LONG))}
        items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session")
def host_path() -> Path:
    """Path of the host; tests that need it are skipped without one."""
    named = os.environ.get("COMFYUI_PATH")
    if not named:
        pytest.skip("COMFYUI_PATH is not set (python tools/dev.py test sets it)")
    return Path(named)


@pytest.fixture(scope="session")
def host(host_path):
    """The host's `nodes` module, imported into this process on the CPU; `comfy` is importable too. Attention is the one
    that the host takes on most GPUs; the server has that of the CPU."""
    open_host(str(host_path), cpu=True)
    from comfy.cli_args import args

    args.use_pytorch_cross_attention = True
    import nodes

    return nodes


@pytest.fixture
def narrow(monkeypatch):
    """A UNet of Shapeland's kind with random weights, that trains in a moment."""
    import torch
    from conceptloom.shapeland import models

    config = {**models.UNET_CONFIG, "block_out_channels": (32, 64, 64, 64), "layers_per_block": 1}
    monkeypatch.setattr(models, "UNET_CONFIG", config)
    torch.manual_seed(0)
    state, load = models.build_unet().state_dict(), models.load
    monkeypatch.setattr(models, "load", lambda name, path=None: dict(state) if name == "unet" else load(name, path))


@pytest.fixture(scope="session", params=["sd15", "sdxl"])
def diffusers_folder(request, tmp_path_factory):
    """A diffusers folder with tiny random models of one or two text towers, and one with a vision tower."""
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    torch.manual_seed(0)
    root, twofold = tmp_path_factory.mktemp(request.param), request.param == "sdxl"
    letters = "abcdefghijklmnopqrstuvwxyz"
    names = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[]).save_pretrained(root / "tokenizer")
    tower = {"num_attention_heads": 2, "num_hidden_layers": 3, "projection_dim": 24}
    text = {**tower, "vocab_size": len(names), "bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    config = CLIPTextConfig(hidden_size=32, intermediate_size=32, **text)
    CLIPTextModel(config).save_pretrained(root / "text_encoder")
    blocks = {
        "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        "block_out_channels": (32,) * 4,
    }
    if twofold:
        CLIPTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[], pad_token="a").save_pretrained(
            root / "tokenizer_2"
        )
        config = CLIPTextConfig(hidden_size=48, intermediate_size=32, **text)
        CLIPTextModelWithProjection(config).save_pretrained(root / "text_encoder_2")
        blocks = {
            "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
            "up_block_types": (*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
            "block_out_channels": (32,) * 3,
            "transformer_layers_per_block": (1, 1, 2),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 24,
            "use_linear_projection": True,
        }
    unet = UNet2DConditionModel(
        sample_size=16, layers_per_block=2 if not twofold else 1, cross_attention_dim=80 if twofold else 32,
        attention_head_dim=2, **blocks,
    )  # fmt: skip
    unet.save_pretrained(root / "unet")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
    ).save_pretrained(root / "vae")  # fmt: skip
    DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(root / "scheduler")
    vision = {**tower, "hidden_size": 32, "intermediate_size": 32, "image_size": 32, "patch_size": 16}
    CLIPVisionModelWithProjection(CLIPVisionConfig(**vision)).save_pretrained(root / "vision")
    return root, twofold


@dataclass
class Run:
    """A finished workflow: its history entry, websocket messages in order, and pictures."""

    entry: dict
    events: list[tuple[str, dict]]
    pictures: list[Picture]

    def named(self, kind: str) -> list[dict]:
        """The data of all messages of one kind, such as `executed` or `progress`."""
        return [data for name, data in self.events if name == kind]

    @property
    def cached(self) -> set[str]:
        """Ids of the nodes that the host did not run again."""
        return {node for data in self.named("execution_cached") for node in data["nodes"]}


@dataclass
class Follower:
    """Collects what the server sends to one client over the websocket, in a thread of its own."""

    url: str
    client_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    events: list[tuple[str, dict]] = field(default_factory=list)
    listening: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)

    async def listen(self) -> None:
        """Reads messages until a workflow has ended."""
        import aiohttp

        address = f"{self.url.replace('http', 'ws', 1)}/ws?clientId={self.client_id}"
        async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
            self.listening.set()
            async for message in socket:
                if message.type is aiohttp.WSMsgType.BINARY:
                    self._binary(message.data)
                    continue
                if message.type is not aiohttp.WSMsgType.TEXT:
                    continue
                event = json.loads(message.data)
                self.events.append((event["type"], event["data"]))
                if event["type"] in ("execution_success", "execution_error", "execution_interrupted"):
                    break
        self.ended.set()

    def _binary(self, data: bytes) -> None:
        """Keeps a text that the host shows on a node; other binary frames are previews."""
        kind, length = struct.unpack_from(">II", data)
        if kind == PROGRESS_TEXT:
            node, text = data[8 : 8 + length].decode(), data[8 + length :].decode()
            self.events.append(("progress_text", {"node": node, "text": text}))


class Server(HostServer):
    """The host's server as tests use it."""

    def run(self, workflow: dict, timeout: float = 600) -> Run:
        """Queues a workflow in API format and follows it to its end; raises PromptError if it is refused or fails."""
        follower = Follower(self.url)
        threading.Thread(target=lambda: asyncio.run(follower.listen()), daemon=True).start()
        assert follower.listening.wait(30), "the server's websocket does not open"
        prompt_id = self.submit(workflow, follower.client_id)
        entry = self.finish(prompt_id, timeout)
        assert follower.ended.wait(30), "the websocket never said that the workflow ended"
        return Run(entry, follower.events, self.pictures(entry))


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory) -> Path:
    """A copy of the toy pack, to which tests may add templates."""
    folder = tmp_path_factory.mktemp("toy") / "toy"
    shutil.copytree(ROOT / "tests" / "toy_pack", folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "workflows").mkdir()
    return folder


@pytest.fixture(scope="session")
def server(host_path, toy_folder, tmp_path_factory):
    """One real server for all tests, with an empty base directory, this pack and the toy pack.

    It remembers what it ran, so that a template is drawn once, although tests of its file and of both renderers run it.
    """
    base = tmp_path_factory.mktemp("server")
    with Server(
        Path(sys.executable),
        host_path,
        base,
        cpu=True,
        log=base / "server.log",
        more_packs={"toy": toy_folder, **STAND_INS},
        options=("--cache-lru", "1000"),
    ) as running:
        yield running


@pytest.fixture(scope="session")
def object_info(server) -> dict:
    """The server's description of every node that it knows."""
    return server.get("/object_info")
