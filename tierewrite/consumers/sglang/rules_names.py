"""What SGLang demands of files, names and ties: every parameter has a key, and its class knows the key."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tierewrite import formats
from tierewrite.consumers import common_rules, modelopt
from tierewrite.consumers.findings import Finding
from tierewrite.consumers.rules import Rule, RuleSet
from tierewrite.consumers.sglang.subject import SglangSubject, is_head
from tierewrite.ties.fit import is_no_evidence
from tierewrite.ties.on_disk import WHOLE

RULES: RuleSet[SglangSubject] = RuleSet()
FILES = "model_loader/weight_utils.py filter_duplicate_safetensors_files"

INDEX_NAMES_MISSING_FILE = Rule(
    id="index-names-missing-file",
    title="the index names files that are not there",
    severity="error",
    consequence="SGLang refuses to load",
    fix="bring the files, or export again",
    source=FILES,
)


@RULES.add(INDEX_NAMES_MISSING_FILE)
def absent_files(s: SglangSubject) -> Iterator[Finding]:
    """weight_utils.py `filter_duplicate_safetensors_files`: "references N shard file(s) missing on disk"."""
    return common_rules.absent_files(s, INDEX_NAMES_MISSING_FILE)


FILE_NOT_INDEXED = Rule(
    id="file-not-indexed",
    title="a file is not in the index",
    when="some of its tensors are nowhere else",
    severity="error",
    consequence="SGLang does not read it; the parameters stay uninitialised",
    fix="add the tensors to the index",
    source=FILES,
)
FILE_REPEATED = replace(
    FILE_NOT_INDEXED,
    when="all of its tensors are in other files too",
    severity="warning",
    consequence="SGLang does not read it",
    fix="remove the file",
)


@RULES.add(FILE_NOT_INDEXED, FILE_REPEATED)
def unread_files(s: SglangSubject) -> Iterator[Finding]:
    """weight_utils.py `filter_duplicate_safetensors_files`: what the index does not name is left out."""
    for name, keys in s.folder.unread.items():
        lost = [key for key in keys if key not in s.entries]
        rule = FILE_NOT_INDEXED if lost else FILE_REPEATED
        yield rule.at(lost or (name,), f"{name} is not in the index and holds {len(keys)} tensors")


DUPLICATE_KEY = Rule(
    id="duplicate-key",
    title="a tensor is in several files",
    when="the bytes differ",
    severity="error",
    consequence="the file whose name comes last in alphabetical order wins",
    fix="keep one of them",
    source="model_loader/loader.py DefaultModelLoader._prepare_weights",
)
DUPLICATE_KEY_EQUAL = replace(DUPLICATE_KEY, when="the bytes are equal", severity="warning")


@RULES.add(DUPLICATE_KEY, DUPLICATE_KEY_EQUAL)
def duplicate_keys(s: SglangSubject) -> Iterator[Finding]:
    """loader.py `DefaultModelLoader._prepare_weights`: files are read sorted by name, keys loaded as they come."""
    return common_rules.repeated_keys(s, DUPLICATE_KEY, DUPLICATE_KEY_EQUAL)


HEAD_NOT_TIED = Rule(
    id="head-not-tied",
    title="the class has a head of its own, and the checkpoint has none",
    severity="error",
    consequence="SGLang does not tie it, whatever the config says: the head stays uninitialised, without a warning",
    fix="keep the head: rewrite the original export with --for sglang, or write it again with expand",
    source="models/mixtral.py MixtralForCausalLM.__init__ and its like, a ParallelLMHead without a look at "
    "tie_word_embeddings",
)


@RULES.add(HEAD_NOT_TIED)
def heads(s: SglangSubject) -> Iterator[Finding]:
    """models/mixtral.py, qwen2_moe.py, qwen3_moe.py, glm4_moe.py, stablelm.py, ... : sglang issue 19908."""
    if s.known.head != "own" or s.folder.absent:
        return
    missing = [alias for canonical, aliases in s.tied() for alias in aliases if is_head(alias) and not s.stored(alias)]
    if missing:
        yield HEAD_NOT_TIED.at(missing, f"{s.architecture} has a head of its own, and {missing[0]} is not stored")


ONLY_ALIAS_STORED = Rule(
    id="only-alias-stored",
    title="of a tied weight only another name than the canonical one is stored",
    severity="error",
    consequence="SGLang looks for the canonical name alone: the parameter stays uninitialised",
    fix="rewrite stores it under the canonical name",
    fixed_by="rewrite",
    source="models/qwen3.py Qwen3ForCausalLM.load_weights, models/gemma4_diffusion.py load_weights",
)


@RULES.add(ONLY_ALIAS_STORED)
def only_aliases(s: SglangSubject) -> Iterator[Finding]:
    """models/qwen3.py: a tied class passes `lm_head.weight` over; gemma4_diffusion.py reads the decoder's names."""
    if s.known.how == "not known":
        return
    lost = [
        next(alias for alias in aliases if s.stored(alias))
        for canonical, aliases in s.tied()
        if not s.stored(canonical) and any(s.stored(alias) for alias in aliases)
    ]
    if lost:
        yield ONLY_ALIAS_STORED.at(lost, f"{len(lost)} tied weights are stored, and not under their canonical names")


NAME_CONFLICT = Rule(
    id="name-conflict",
    title="names of a declared tie are stored with different bytes",
    when="the class has one parameter for both",
    severity="error",
    consequence="SGLang loads the canonical name and passes the other over, whatever was trained",
    fix="set tie_word_embeddings to false if they are meant to differ, or export again",
    source="models/qwen3.py Qwen3ForCausalLM.load_weights, models/gemma4_diffusion.py load_weights",
)
UNTIED_AFTER_ALL = replace(
    NAME_CONFLICT,
    when="the class does not tie the head",
    severity="warning",
    consequence="SGLang loads both, each into a parameter of its own, though the config says that they are one",
    fix="set tie_word_embeddings to false if they are meant to differ",
    source="models/mixtral.py MixtralForCausalLM.__init__",
)


@RULES.add(NAME_CONFLICT, UNTIED_AFTER_ALL)
def names_of_ties(s: SglangSubject) -> Iterator[Finding]:
    """models/qwen3.py: a tied class passes `lm_head.weight` over; gemma4_diffusion.py reads the decoder's names."""
    if s.known.head is None:
        return
    meeting = [
        [name for name in (canonical, *aliases) if name in s.entries]
        for canonical, aliases in s.tied()
        if canonical in s.entries and any(alias in s.entries for alias in aliases)
    ]
    meeting.sort(key=lambda names: s.entries[names[0]].nbytes)
    verdicts = s.equal(tuple(s.entries[name] for name in names) for names in meeting)
    differ = [names for names, verdict in zip(meeting, verdicts, strict=True) if verdict is False]
    own = [name for names in differ if s.known.head == "own" and any(map(is_head, names)) for name in names]
    lost = [name for names in differ for name in names if name not in set(own)]
    for rule, found in ((NAME_CONFLICT, lost), (UNTIED_AFTER_ALL, own)):
        if found:
            yield rule.at(found, f"{len(found)} names of declared ties hold different bytes")


PARAMETER_MISSING = Rule(
    id="parameter-missing",
    title="parameters are filled by no key",
    severity="error",
    consequence="SGLang computes with uninitialised memory, without a warning",
    fix="export again, or copy them from a complete checkpoint",
    source="model_loader/loader.py DefaultModelLoader.load_weights_only",
    decided_by_loader=True,
)


@RULES.add(PARAMETER_MISSING)
def missing_parameters(s: SglangSubject) -> Iterator[Finding]:
    """loader.py `load_weights_only`: nothing looks for parameters that no key filled (DiffusionGemma warns)."""
    plain, shards, experts = common_rules.missing_parameters(s)
    names = [*plain, *shards, *experts]
    if names:
        yield PARAMETER_MISSING.at(names, f"{len(names)} {PARAMETER_MISSING.title}")


WRONG_SHAPE = Rule(
    id="wrong-shape",
    title="tensors have other shapes than their parameters",
    severity="error",
    consequence="SGLang aborts the load, or fills a part of the parameter without a warning",
    fix="correct the config, or export again",
    source="layers/parameter.py _ColumnvLLMParameter.load_column_parallel_weight",
    decided_by_loader=True,
)


@RULES.add(WRONG_SHAPE)
def shapes(s: SglangSubject) -> Iterator[Finding]:
    """parameter.py asserts equal shapes; fused_moe_triton/layer.py narrows what is there."""
    wrong = modelopt.wrong_weight_shapes(s, s.built_quantized, s.layout)
    if wrong:
        yield WRONG_SHAPE.at(wrong, f"{len(wrong)} {WRONG_SHAPE.title}")


UNEXPECTED_TENSOR = Rule(
    id="unexpected-tensor",
    title="tensors belong to no parameter",
    when="the class refuses such names",
    severity="error",
    consequence="SGLang aborts the load with a KeyError",
    fix="remove what calibration left over, or export again",
    source="models/qwen3.py Qwen3ForCausalLM.load_weights, models/mixtral.py MixtralForCausalLM.load_weights",
    decided_by_loader=True,
)
IGNORED_TENSOR = replace(
    UNEXPECTED_TENSOR,
    when="the class passes such names over",
    severity="warning",
    consequence="SGLang passes them over, in some classes with a warning",
    fix="if they matter, the class or the config is wrong",
)


@RULES.add(UNEXPECTED_TENSOR, IGNORED_TENSOR)
def unexpected_tensors(s: SglangSubject) -> Iterator[Finding]:
    """models/qwen3.py: `params_dict[name]` where a name contains that of a fused projection; elsewhere it looks."""
    if s.model is None or s.known.how != "measured":
        return
    refused: list[str] = []
    ignored: list[str] = []
    for key in s.entries:
        leaf = key.rpartition(".")[2]
        if key in s.places or key in s.in_unknown_format or s.belongs_to_weight(key) or formats.is_main(leaf):
            continue
        if is_no_evidence(key, s.config):
            continue
        fused = any(f".{shard}." in key for shard in ("q_proj", "k_proj", "v_proj"))
        does = s.known.leftover_fused if fused else s.known.leftover
        (refused if does == "refused" and leaf != "bias" else ignored).append(key)
    if refused:
        yield UNEXPECTED_TENSOR.at(refused, f"{len(refused)} {UNEXPECTED_TENSOR.title}")
    if ignored:
        yield IGNORED_TENSOR.at(ignored, f"{len(ignored)} {UNEXPECTED_TENSOR.title}")


EXPERTS_FUSED = Rule(
    id="experts-fused",
    title="experts' weights are stored as one tensor, and the class has them one by one",
    severity="error",
    consequence="SGLang passes them over: the experts stay uninitialised, without a warning",
    fix="export them one by one, as on the hub",
    source="models/qwen3_moe.py Qwen3MoeForCausalLM.load_weights",
    decided_by_loader=True,
)


@RULES.add(EXPERTS_FUSED)
def fused_experts(s: SglangSubject) -> Iterator[Finding]:
    """models/qwen3_moe.py: `make_expert_params_mapping` with a number in every name."""
    if s.known.fused_experts is not False or s.model is None:
        return
    keys = [
        k for k, (p, part) in s.places.items() if part == WHOLE and ".experts." in k and len(s.model.shapes[p]) == 3
    ]
    if keys:
        yield EXPERTS_FUSED.at(keys, f"{len(keys)} tensors hold all experts of a layer")
