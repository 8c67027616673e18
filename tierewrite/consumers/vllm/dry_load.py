"""Runs vLLM's own model class and weight loaders on checkpoint folders, on the meta device and without a GPU.

A script for the Python of a serving environment; it imports nothing of tierewrite but the modules of loader_process/,
by their file names. vLLM's are: the configs, the quantization config and its mapping of names, the model with every
`create_weights`, the list and the order of files and keys, every weight loader, and the check for parameters that
were not initialised. Replaced: the choice of kernels (none has to run), and safetensors' `safe_open`, which gives
tensors without bytes. `process_weights_after_loading` is not run. Read in vLLM 0.33.0.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tierewrite.consumers.loader_process import dry_process, dry_writes
else:
    sys.path[0] = str(Path(__file__).resolve().parent.parent / "loader_process")
    import dry_process

# Before torch and vLLM are imported: vLLM's CPU platform, no network, and nothing kept in the user's folders.
_HOME = os.environ.get("TMPDIR") or tempfile.gettempdir()
os.environ.update(
    VLLM_TARGET_DEVICE="cpu", CUDA_VISIBLE_DEVICES="", VLLM_LOGGING_LEVEL="WARNING", VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", VLLM_CACHE_ROOT=f"{_HOME}/vllm", HF_MODULES_CACHE=f"{_HOME}/modules",
    VLLM_USE_V2_MODEL_RUNNER="1", VLLM_MLA_DISABLE="0", VLLM_PLUGINS="", TORCHINDUCTOR_CACHE_DIR=f"{_HOME}/inductor",
    TRITON_CACHE_DIR=f"{_HOME}/triton",
)  # fmt: skip
import torch  # noqa: E402

_kept: list[Any] = []
# Runtime copies of the k_scale, v_scale, ... parameters, and tables that are computed.
COPIES = ("_k_scale", "_v_scale", "_q_scale", "_prob_scale")


class Vllm:
    """See `dry_process.Loader`."""

    consumer = "vllm"

    def imports(self) -> str:
        """See Loader."""
        _torchvision_without_operators()
        try:
            import vllm
        except ImportError as error:
            raise dry_process.Unavailable(f"vLLM cannot be imported by {sys.executable}: {error}") from None
        import vllm.platforms

        vllm.platforms.builtin_platform_plugins = {"cpu": lambda: "vllm.platforms.cpu.CpuPlatform"}
        import vllm.engine.arg_utils
        import vllm.model_executor.layers.quantization.modelopt
        import vllm.model_executor.model_loader.default_loader
        import vllm.model_executor.models.registry as registry

        registry._run_in_subprocess = lambda function: function()
        for replace in (
            _stub_operators, _any_linear_kernel, _any_moe_kernel, _experts_without_gate, _any_capability,
            _any_cache_dtype, _own_layers_stay,
        ):  # fmt: skip
            replace()
        return str(vllm.__version__)

    def prepare(self, folder: str, rank: int, ranks: int, meeting: str, trust_remote_code: bool) -> Any:
        """The VllmConfig that `vllm serve` would make of the folder."""
        from vllm.config import set_current_vllm_config
        from vllm.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
        from vllm.engine.arg_utils import EngineArgs

        config = EngineArgs(
            model=folder, skip_tokenizer_init=True, enforce_eager=True, max_model_len=64, tensor_parallel_size=ranks,
            trust_remote_code=trust_remote_code, safetensors_load_strategy="lazy", disable_log_stats=True,
            distributed_executor_backend="external_launcher" if ranks > 1 else None,
        ).create_engine_config()  # fmt: skip
        with set_current_vllm_config(config):
            init_distributed_environment(ranks, rank, meeting, rank, "gloo")
            initialize_model_parallel(ranks)
        return config

    def build(self, prepared: Any) -> torch.nn.Module:
        """See Loader."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.utils import initialize_model
        from vllm.utils.torch_utils import set_default_torch_dtype

        prepared.compilation_config.static_forward_context.clear()
        with (
            set_current_vllm_config(prepared),
            torch.device("meta"),
            set_default_torch_dtype(prepared.model_config.dtype),
        ):
            return initialize_model(prepared)

    def load(self, prepared: Any, model: torch.nn.Module, feed: dry_writes.Feed) -> None:
        """See Loader."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader import weight_utils
        from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

        loader = DefaultModelLoader(prepared.load_config)
        everything = loader.get_all_weights
        loader.get_all_weights = lambda *args, **named: feed.watched(everything(*args, **named))
        weight_utils.safe_open = feed.open
        with set_current_vllm_config(prepared):
            loader.load_weights(model, prepared.model_config)

    def targets(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """See Loader."""
        return dict(dry_process.persistent(model, lambda name: name.rpartition(".")[2] in COPIES))

    def described(self, prepared: Any, model: torch.nn.Module) -> dict[str, Any]:
        """See Loader."""
        plain = ("UnquantizedLinearMethod", "UnquantizedFusedMoEMethod", "UnquantizedEmbeddingMethod")
        quantization = prepared.model_config.quantization or ""
        methods = {name: type(getattr(module, "quant_method", None)).__name__ for name, module in model.named_modules()}
        return {
            "model_class": type(model).__name__,
            "quantization": quantization,
            "unquantized": [name for name, method in methods.items() if quantization and method in plain],
        }

    def unused(self, prepared: Any, parameter: str) -> bool:
        """Weight-only NVFP4 registers input scales and never reads them (quantization/modelopt.py)."""
        weight_only = getattr(prepared.quant_config, "quant_method", None) == "W4A16_NVFP4"
        return weight_only and parameter.endswith("input_scale")


def _torchvision_without_operators() -> None:
    """Lets a CUDA build of torchvision be imported beside a CPU build of torch: nothing here calls its operators."""
    register = torch.library.register_fake

    def without_torchvision(op: Any, func: Any = None, /, **named: Any) -> Any:
        if isinstance(op, str) and op.startswith("torchvision::"):
            return (lambda f: f) if func is None else func
        return register(op, func, **named)

    torch.library.register_fake = without_torchvision
    try:
        with contextlib.suppress(Exception):
            import torchvision  # noqa: F401
    finally:
        torch.library.register_fake = register


def _stub_operators() -> None:
    """Layers look their compiled operators up when they are built."""
    library = torch.library.Library("_C", "FRAGMENT")
    _kept.append(library)
    for name in ("gelu_quick", "gelu_new", "gelu_fast", "gelu_and_mul", "gelu_tanh_and_mul", "silu_and_mul"):
        with contextlib.suppress(Exception):
            library.define(f"{name}(Tensor! out, Tensor input) -> ()")


def _any_linear_kernel() -> None:
    """The first kernel that there is for CUDA, unchecked; for NVFP4 the emulation, which every platform could have."""
    import vllm.model_executor.kernels.linear as linear
    from vllm.platforms.interface import PlatformEnum

    with contextlib.suppress(AttributeError):
        linear._POSSIBLE_NVFP4_KERNELS[PlatformEnum.CPU] = [linear.EmulationNvFp4LinearKernel]
    for name in dir(linear):
        kernels = getattr(linear, name)
        if not (name.startswith("_POSSIBLE") and isinstance(kernels, dict)):
            continue
        if not kernels.get(PlatformEnum.CPU) and kernels.get(PlatformEnum.CUDA):
            kernels[PlatformEnum.CPU] = list(kernels[PlatformEnum.CUDA])
        for kernel in kernels.get(PlatformEnum.CPU) or ():
            _allow(kernel)
    with contextlib.suppress(AttributeError):
        _allow(linear.MarlinNvFp4LinearKernel)  # weight-only checkpoints ask for it by name


def _allow(kernel: Any) -> None:
    for method in ("is_supported", "can_implement"):
        if hasattr(kernel, method):
            setattr(kernel, method, classmethod(lambda *args, **named: (True, None)))


def _any_moe_kernel() -> None:
    """Kernels of experts: the emulation where there is one, else Triton's; what a kernel needs decides no parameter.

    Those that pad the experts are avoided: what is padding is filled by no key.
    """
    folder = "vllm.model_executor.layers.fused_moe.oracle"
    for name in ("nvfp4", "fp8", "mxfp4", "mxfp8", "int8", "int_wna16", "w4a8"):
        with contextlib.suppress(ImportError):
            module = importlib.import_module(f"{folder}.{name}")
            for function in [each for each in dir(module) if each.startswith("select_") and each.endswith("_backend")]:
                chosen = _moe_backend(module)
                if chosen is not None:
                    _put_everywhere(function, lambda *args, chosen=chosen, **named: chosen)
    with contextlib.suppress(ImportError, AttributeError):
        plain = importlib.import_module(f"{folder}.unquantized")
        select = plain.select_unquantized_moe_backend

        def any_backend(*args: Any, **named: Any) -> Any:
            try:
                return select(*args, **named)
            except NotImplementedError:
                return _moe_backend(plain)

        _put_everywhere("select_unquantized_moe_backend", any_backend)


def _moe_backend(module: Any) -> tuple[Any, Any] | None:
    """A backend of the oracle `module`, and its class of experts, None where that cannot be imported here."""
    kinds = [getattr(module, name) for name in dir(module) if name.endswith(("MoeBackend", "MoEBackend"))]
    for backend in ("EMULATION", "TRITON", "CUTLASS"):
        for kind in kinds:
            if hasattr(kind, backend):
                experts = None
                with contextlib.suppress(Exception):
                    experts = module.backend_to_kernel_cls(getattr(kind, backend))[0]
                return getattr(kind, backend), experts
    return None


def _put_everywhere(name: str, function: Any) -> None:
    """Replaces vLLM's function `name` in every module that has it already; those to come take it from there."""
    for module in [module for key, module in sys.modules.items() if key.startswith("vllm.model_executor.layers")]:
        if name in vars(module):
            setattr(module, name, function)


def _any_capability() -> None:
    """Every quantization is taken, as a GPU that is new enough takes it."""
    import vllm.platforms.cpu as cpu

    cpu.CpuPlatform.has_device_capability = classmethod(lambda *args, **named: True)
    cpu.CpuPlatform.supported_quantization = []
    with contextlib.suppress(ImportError, AttributeError):
        import vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors as compressed

        compressed.CompressedTensorsConfig._check_scheme_supported = lambda self, *args, **named: True


def _experts_without_gate() -> None:
    """fused_moe/config.py refuses experts without a gate where there is no GPU."""
    with contextlib.suppress(ImportError, AttributeError):
        import vllm.model_executor.layers.fused_moe.config as experts

        platform = experts.current_platform

        class Gpu:
            def __getattr__(self, name: str) -> Any:
                return getattr(platform, name)

            def is_cuda_alike(self) -> bool:
                return True

        experts.current_platform = Gpu()


def _any_cache_dtype() -> None:
    with contextlib.suppress(ImportError, AttributeError):
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        CPUAttentionBackend.supports_kv_cache_dtype = classmethod(lambda *args: True)


def _own_layers_stay() -> None:
    """Lets vLLM's own layers in a model of transformers' keep their parameters, and so their initial values.

    models/transformers/base.py allocates anew, in the model's dtype, what is on the meta device after it put vLLM's
    layers in: else that is transformers' alone, and here it is everything. It passes over what has a `weight_loader`.
    """
    with contextlib.suppress(ImportError, AttributeError):
        from vllm.model_executor.model_loader.weight_utils import default_weight_loader
        from vllm.model_executor.models.transformers.base import Base

        allocate = Base.init_parameters

        def of_transformers_alone(self: Any, module: torch.nn.Module, *args: Any, **named: Any) -> None:
            for layer in module.modules():
                if type(layer).__module__.startswith("vllm."):
                    for parameter in layer.parameters(recurse=False):
                        if not hasattr(parameter, "weight_loader"):
                            parameter.weight_loader = default_weight_loader
            allocate(self, module, *args, **named)

        Base.init_parameters = of_transformers_alone


if __name__ == "__main__":
    dry_process.main(Vllm())
