"""Runs SGLang's own model class and weight loaders on checkpoint folders, on the meta device and without a GPU.

A script for the Python of a serving environment; it imports nothing of tierewrite but the modules of loader_process/,
by their file names. SGLang's are: the server arguments, the model and quantization configs, the model with every
`create_weights`, the list and the order of files and keys, `load_weights` and every weight loader. Replaced: what asks
for a GPU, and safetensors' `safe_open`, which gives tensors without bytes. `process_weights_after_loading` is not run.
Read in SGLang 0.5.23.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib.abc
import importlib.machinery
import json
import os
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from tierewrite.consumers.loader_process import dry_process, dry_writes
else:
    sys.path[0] = str(Path(__file__).resolve().parent.parent / "loader_process")
    import dry_process

# Before torch and SGLang are imported: the CPU engine, no network, and nothing kept in the user's folders.
_HOME = os.environ.get("TMPDIR") or tempfile.gettempdir()
os.environ.update(
    SGLANG_USE_CPU_ENGINE="1", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1", HF_MODULES_CACHE=f"{_HOME}/modules", SGLANG_PLUGINS="",
    TORCHINDUCTOR_CACHE_DIR=f"{_HOME}/inductor", TRITON_CACHE_DIR=f"{_HOME}/triton",
)  # fmt: skip
import torch  # noqa: E402

T = TypeVar("T")
NEVER_CALLED = ("sgl_kernel", "IPython")
# Made after the load from what was loaded: modelopt_quant.py `process_weights_after_loading`.
MADE_LATER = ("_blockscale_swizzled",)


class Sglang:
    """See `dry_process.Loader`."""

    consumer = "sglang"

    def imports(self) -> str:
        """See Loader."""
        sys.meta_path.insert(0, _Stubs())
        torch.ops.sgl_kernel = _EmptyModule("torch.ops.sgl_kernel")
        torch.cuda.get_device_capability = lambda *_: (10, 0)
        concurrent.futures.ThreadPoolExecutor = _AtOnce  # type: ignore[misc, assignment]
        with _operators_that_are_there():
            try:
                import sglang
            except ImportError as error:
                raise dry_process.Unavailable(f"SGLang cannot be imported by {sys.executable}: {error}") from None
            import sglang.srt.model_loader.loader
            import sglang.srt.models.registry
            import sglang.srt.server_args
        return str(sglang.__version__)

    def prepare(self, folder: str, rank: int, ranks: int, meeting: str, trust_remote_code: bool) -> Any:
        """SGLang's model config, load config and quantization config of the folder."""
        from sglang.srt.configs.load_config import LoadConfig
        from sglang.srt.configs.model_config import ModelConfig
        from sglang.srt.model_loader import loader

        with _not_the_checkpoint():
            args = _server_args(folder, rank, ranks, trust_remote_code)
        config = ModelConfig(model_path=folder, trust_remote_code=trust_remote_code)
        with _not_the_checkpoint():
            _join_groups(args, rank, ranks, meeting)
            _as_on_a_gpu()
        load_config = LoadConfig(load_format="auto")
        return config, load_config, loader._get_quantization_config(config, load_config)

    def build(self, prepared: Any) -> torch.nn.Module:
        """See Loader."""
        from sglang.srt.model_loader import loader
        from sglang.srt.model_loader.utils import set_default_torch_dtype

        try:
            with set_default_torch_dtype(prepared[0].dtype), torch.device("meta"):
                return loader._initialize_model(*prepared)
        except (AttributeError, TypeError) as error:
            # Mostly what SGLang asked this machine for and did not get; a config that lacks something looks the same.
            raise dry_process.Unavailable(f"SGLang cannot build it this way: {error}") from error
        except NotImplementedError as error:
            if "meta" in str(error):
                raise
            # What the class does not take is said so; PyTorch's own errors of that type are of another kind.
            raise dry_process.Refusal(f"NotImplementedError: {error}") from error

    def load(self, prepared: Any, model: torch.nn.Module, feed: dry_writes.Feed) -> None:
        """See Loader."""
        from sglang.srt.model_loader import loader, weight_utils
        from sglang.srt.model_loader.utils import set_default_torch_dtype

        config, load_config, _ = prepared
        weight_utils.safetensors = types.SimpleNamespace(safe_open=feed.open)
        items = loader.DefaultModelLoader(load_config)._get_all_weights(config, model)
        with set_default_torch_dtype(config.dtype):
            loader.DefaultModelLoader.load_weights_only(model, feed.watched(items), torch.device("meta"))

    def targets(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """See Loader."""
        return {name: t for name, t in dry_process.persistent(model) if not name.endswith(MADE_LATER)}

    def described(self, prepared: Any, model: torch.nn.Module) -> dict[str, Any]:
        """See Loader."""
        quantization = "" if prepared[2] is None else str(prepared[2].get_name())
        plain = ("UnquantizedLinearMethod", "UnquantizedFusedMoEMethod")
        methods = {name: type(getattr(module, "quant_method", None)).__name__ for name, module in model.named_modules()}
        return {
            "model_class": type(model).__name__,
            "quantization": quantization,
            "unquantized": [name for name, method in methods.items() if quantization and method in plain],
        }

    def unused(self, prepared: Any, parameter: str) -> bool:
        """Weight-only NVFP4 never reads its input scales (modelopt_quant.py). Experts of MXFP4 are padded with zeros
        (mxfp4.py): what is not written cannot be told from what is missing.
        """
        if prepared[2] is not None and prepared[2].get_name() == "mxfp4" and ".experts." in parameter:
            return True
        return parameter.endswith("input_scale") and _declared_algorithm(prepared[0]) == "W4A16_NVFP4"


def _declared_algorithm(config: Any) -> str:
    """`quant_algo` of config.json, else of hf_quant_config.json."""
    inside = getattr(config.hf_config, "quantization_config", None)
    if not isinstance(inside, dict):
        path = Path(config.model_path) / "hf_quant_config.json"
        inside = json.loads(path.read_text(encoding="utf-8")).get("quantization", {}) if path.exists() else {}
    return str(inside.get("quant_algo", ""))


@contextlib.contextmanager
def _not_the_checkpoint() -> Any:
    """What fails in here says that this machine or version of SGLang cannot be used, and nothing of the checkpoint."""
    try:
        yield
    except Exception as error:
        if "Unknown quantization method" in str(error):
            raise dry_process.Refusal(f"{type(error).__name__}: {error}") from error
        raise dry_process.Unavailable(f"SGLang cannot be started this way: {type(error).__name__}: {error}") from error


def _server_args(folder: str, rank: int, ranks: int, trust_remote_code: bool) -> Any:
    """The arguments of a server of the folder, made known to SGLang's modules."""
    from sglang.srt.layers.moe import initialize_moe_config
    from sglang.srt.layers.quantization.fp4_utils import initialize_fp4_gemm_config
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs

    args = ServerArgs(
        model_path=folder, device="cpu", tp_size=ranks, trust_remote_code=trust_remote_code, skip_tokenizer_init=True,
        attention_backend="triton", disable_cuda_graph=True, mem_fraction_static=0.1, disable_radix_cache=True,
        moe_runner_backend="marlin", fp4_gemm_runner_backend="marlin",
    )  # fmt: skip
    publish(args, role="scheduler", ranks=SpawnRanks(world_rank=rank, gpu_id=0))
    initialize_moe_config()
    initialize_fp4_gemm_config()
    return args


def _join_groups(args: Any, rank: int, ranks: int, meeting: str) -> None:
    """The process groups, as wide as the published arguments say."""
    from sglang.srt.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
    from sglang.srt.layers.dp_attention import initialize_dp_attention

    init_distributed_environment(
        world_size=ranks, rank=rank, distributed_init_method=meeting, local_rank=0, backend="gloo"
    )
    initialize_model_parallel()
    initialize_dp_attention(args)


def _as_on_a_gpu() -> None:
    """Where SGLang asks for the machine, it is a Blackwell GPU; on CPUs, weight loaders pad short weights with zeros
    (linear.py, parameter.py, fused_moe_triton/layer.py), and rotary embeddings want other configs.
    """
    import sglang.srt.layers.linear as linear
    import sglang.srt.layers.moe.fused_moe_triton.layer as experts
    import sglang.srt.layers.parameter as parameter
    import sglang.srt.layers.quantization.modelopt_quant as modelopt
    import sglang.srt.layers.rotary_embedding.factory as rotary

    real = modelopt.get_platform

    class Blackwell:
        is_blackwell = True

        def __getattr__(self, name: str) -> Any:
            return getattr(real(), name)

    modelopt.get_platform = Blackwell
    for name, module in list(sys.modules.items()):
        if name.startswith("sglang.srt.") and hasattr(module, "get_device_capability"):
            setattr(module, "get_device_capability", torch.cuda.get_device_capability)  # noqa: B010
        if name.startswith("sglang.srt.models.") and getattr(module, "_is_cpu", False) is True:
            setattr(module, "_is_cpu", False)  # noqa: B010
    for module in (linear, parameter, experts):
        module._is_cpu = False
    rotary.get_rope_cpu = lambda *args, **_: rotary.get_rope(*args[:8])


class _AtOnce(concurrent.futures.Executor):
    """Runs a task where it is submitted: writes are recorded in one thread."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__()

    def submit(self, fn: Callable[..., T], /, *args: Any, **named: Any) -> concurrent.futures.Future[T]:
        """See concurrent.futures.Executor."""
        done: concurrent.futures.Future[T] = concurrent.futures.Future()
        try:
            done.set_result(fn(*args, **named))
        except BaseException as error:
            done.set_exception(error)
        return done


class _Nothing:
    """Stands for a kernel, which loading does not call."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *args: Any, **named: Any) -> Any:
        raise dry_process.Unavailable(f"{self._name} was called: there is no kernel")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing(f"{self._name}.{name}")


class _EmptyModule(types.ModuleType):
    """A module in which every name is there, and none can be called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing(f"{self.__name__}.{name}")


class _Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds empty modules for packages of which nothing is called."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """See importlib.abc.MetaPathFinder."""
        known = name.partition(".")[0] in NEVER_CALLED
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """See importlib.abc.Loader."""
        module = _EmptyModule(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing is in it."""


@contextlib.contextmanager
def _operators_that_are_there() -> Any:
    """sgl_kernel, and a CUDA build of torchvision beside a CPU build of torch, have no operators: none is described."""
    register = torch.library.register_fake

    def where_there(operator: Any, function: Any = None, /, **named: Any) -> Any:
        if isinstance(operator, str) and operator.startswith(("torchvision::", "sgl_kernel::")):
            return (lambda f: f) if function is None else function
        return register(operator, function, **named)

    torch.library.register_fake = where_there
    try:
        with contextlib.suppress(Exception):
            import torchvision  # noqa: F401
        yield
    finally:
        torch.library.register_fake = register


if __name__ == "__main__":
    dry_process.main(Sglang())
