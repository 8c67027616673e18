"""The comparison itself: what DST holds against what it must hold, under one declaration of ties."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from tierewrite import formats
from tierewrite.errors import SourceChanged, SystemFailure
from tierewrite.formats import Companion
from tierewrite.numbers import nvfp4
from tierewrite.proof import Problem
from tierewrite.proof.judge import Group, Judge, Stand
from tierewrite.proof.reading import Contents, read_array
from tierewrite.proof.values import BLOBS, FUSED, Scale, check_merge, is_blob, why_no_value
from tierewrite.source.table import MANIFEST_NAME, Checkpoint, TensorEntry
from tierewrite.ties.on_disk import DiskTies
from tierewrite.ties.tie_map import TieMap

_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.([^.]+)\.([^.]+)")


class Proof:
    """One comparison under one declaration of ties."""

    def __init__(
        self,
        source: Checkpoint,
        target: Checkpoint,
        before: Contents,
        after: Contents,
        manifest: Mapping[str, Any] | None,
    ) -> None:
        self.source, self.target, self.before, self.after, self.manifest = source, target, before, after, manifest
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self.counts: dict[str, int] = {}
        self.ties = TieMap((), "none")
        self.scales: dict[str, Scale] = {}
        self.stands: dict[str, Stand] = {}
        self._by_expert: dict[tuple[str, str, str], list[TensorEntry]] | None = None
        self.repacked: dict[str, str | None] = {}  # by module: why its blob is wrong, or None

    def run(self, disk: DiskTies, ties: TieMap) -> None:
        self.ties = ties
        groups = Judge(self.source, disk, self.before.digests).groups(self._may_be_repacked)
        stands = self.stands
        for group in groups:
            if group.reason is None and self._untouched(group):
                if group.dropped or any(stand.changes for stand in group.stands.values()):
                    self._say(
                        "tie-left", group.tie.id, "its sides are one tensor in SRC, but DST still holds them apart"
                    )
                continue
            stands.update(group.stands)
        stands.update(self._kv_scales(groups, {key for stand in stands.values() for key in stand.sources}))
        placed = {key for stand in stands.values() for key in stand.sources}
        refuted = {key: group for group in groups if group.reason is not None for key in group.members}
        for key in self.source.tensors:
            if key not in placed and key not in stands:
                stands[key] = Stand(key, (key,))
            elif key not in placed:
                self._say("unexpected", key, "its name was given to another tensor, its own bytes have no place")
        self._compare(stands, refuted)
        if self.manifest is not None and self._option("unify_fused_scales"):
            self._check_unified()
        self._count(stands)
        if self.manifest is not None:
            self._check_manifest(stands, groups)

    def _say(self, id: str, where: str, message: str) -> None:
        self.problems.append(Problem(id, where, message))

    def _untouched(self, group: Group) -> bool:
        """Whether DST holds the group's tensors exactly as SRC does."""
        keys = [key for stand in group.stands.values() for key in stand.sources]
        return all(self._same_tensor(key, key) for key in keys)

    def _same_tensor(self, key: str, name: str) -> bool:
        a, b = self.source.tensors[key], self.target.tensors.get(name)
        return (
            b is not None
            and (a.dtype, a.shape) == (b.dtype, b.shape)
            and self.before.digests[key] == self.after.digests[name]
        )

    def _compare(self, stands: Mapping[str, Stand], refuted: Mapping[str, Group]) -> None:
        held = set(self.after.digests.values())
        lost: dict[str, list[str]] = {}
        for name, stand in stands.items():
            if name not in self.target.tensors:
                first = stand.sources[0]
                if first in refuted and not stand.changes:
                    lost.setdefault(refuted[first].tie.id, []).append(first)
                elif not stand.changes and self.before.digests[first] in held:
                    self._say(
                        "undeclared-drop", first, "gone; equal bytes are there, but no declared tie makes them one"
                    )
                else:
                    also = f" for {', '.join(stand.sources)}" if stand.changes else ""
                    self._say("missing", name, f"not in DST; expected{also}")
            else:
                self._compare_one(stand)
        reasons = {group.tie.id: group.reason for group in refuted.values()}
        for group, keys in lost.items():
            listed = ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
            self._say(
                "unconfirmed-drop", group, f"{listed} gone, though SRC does not confirm the tie: {reasons[group]}"
            )
        sources = {key: stand.target for stand in stands.values() for key in stand.sources}
        for name in self.target.tensors:
            if name not in stands:
                if name in sources:
                    self._say("tie-left", name, f"still there beside '{sources[name]}', which stands for it")
                elif not self._is_filled(name):
                    self._say("unexpected", name, "nothing in SRC accounts for it")

    def _compare_one(self, stand: Stand) -> None:
        first, found = self.source.tensors[stand.sources[0]], self.target.tensors[stand.target]
        if (first.dtype, first.shape) != (found.dtype, found.shape):
            self._say(
                "header",
                stand.target,
                f"is {found.dtype} {list(found.shape)}; expected {first.dtype} {list(first.shape)} as '{first.name}'",
            )
        elif stand.merge is None or stand.merge.merge is None or why_no_value([first]) is not None:
            if any(self.before.digests[key] != self.after.digests[stand.target] for key in stand.sources):
                why = self._why_not_repacked(stand.target)
                if why is not None:
                    self._say("bytes", stand.target, f"does not hold the bytes of '{first.name}'{why}")
        else:
            sides = [(self.source.tensors[key], self.before.values[key]) for key in stand.sources]
            scale = check_merge(stand.merge, sides, found.dtype, self.after.values[stand.target])
            self.scales[stand.target] = scale
            if not scale.right and not (not scale.calibrated and self._is_filled(stand.target)):
                self._say("merge", stand.target, scale.why)

    def _is_filled(self, name: str) -> bool:
        """Whether a scale of DST that no side of SRC has is the widest of the layer's other experts, as asked for."""
        hit = _EXPERT.fullmatch(name)
        if hit is None or not self._option("fill_missing_scales"):
            return False
        companion = formats.classify("weight", hit[4])
        found = self.target.tensors[name]
        others = [other for other in self._experts().get((hit[1], hit[3], hit[4]), ()) if other.name != name]
        if companion is None or companion.merge is None or name not in self.after.values or not others:
            return False
        if any((other.dtype, other.shape) != (found.dtype, found.shape) for other in others):
            return False
        sides = [(other, self.after.values[other.name]) for other in others if other.name in self.after.values]
        scale = check_merge(companion, sides, found.dtype, self.after.values[name]) if sides else None
        return scale is not None and scale.right and scale.calibrated

    def _experts(self) -> Mapping[tuple[str, str, str], list[TensorEntry]]:
        """DST's tensors of unpacked experts: (container, projection, suffix) -> one an expert."""
        if self._by_expert is None:
            self._by_expert = {}
            for entry in self.target.tensors.values():
                hit = _EXPERT.fullmatch(entry.name)
                if hit is not None:
                    self._by_expert.setdefault((hit[1], hit[3], hit[4]), []).append(entry)
        return self._by_expert

    def _count(self, stands: Mapping[str, Stand]) -> None:
        self.counts = dict.fromkeys(("kept", "renamed", "dropped", "merged", "repacked"), 0)
        for stand in stands.values():
            fate = "merged" if stand.merge is not None else "renamed" if stand.action == "rename" else "kept"
            if self._is_repacked(stand.target):
                fate = "repacked"
            self.counts[fate] += 1
            self.counts["dropped"] += len(stand.sources) - 1

    # -- NVFP4 blobs of different scales ------------------------------------------------------------------------------

    def _option(self, name: str) -> Any:
        """An option of the rewrite; True where there is no manifest to tell, so that the bytes decide."""
        return True if self.manifest is None else self.manifest["options"].get(name)

    def _may_be_repacked(self, group: Group) -> bool:
        """Whether DST holds one blob for sides of different scales: it was asked for, and not all sides are there."""
        if self._option("on_mismatch") not in (True, "repack"):
            return False
        return any(key not in self.target.tensors for key in group.members)

    def _is_repacked(self, name: str) -> bool:
        module, _, suffix = name.rpartition(".")
        return suffix.startswith("weight") and self.repacked.get(module, "") is None

    def _why_not_repacked(self, name: str) -> str | None:
        """None if `name` is part of an NVFP4 blob that is legitimately encoded anew; else a remark for the problem."""
        module, _, suffix = name.rpartition(".")
        for blob in BLOBS:
            names = [f"{module}.{part}" for part in blob]
            if suffix in blob and all(n in self.stands and n in self.target.tensors for n in names):
                if not is_blob([self.target.tensors[n] for n in names]):
                    continue
                if module not in self.repacked:
                    self.repacked[module] = self._judge_blob(module, names, reciprocal=blob[0] != "weight")
                return self.repacked[module]
        return ""

    def _judge_blob(self, module: str, names: list[str], reciprocal: bool) -> str | None:
        """Whether DST's blob is one of the sides' encoded anew to a scale that covers all of them.

        The sides must agree with each other within the rounding of their encodings, element by element.
        """

        mismatch = self._option("on_mismatch") in (True, "repack")
        unify = bool(self._option("unify_fused_scales"))
        if not (mismatch or unify):
            return ""
        rows = [self.stands[name].sources for name in names]
        if len({len(row) for row in rows}) > 1 or not all(
            is_blob([self.source.tensors[key] for key in side]) for side in zip(*rows, strict=True)
        ):
            return ""
        sides = [
            (read_array(self.source, codes), read_array(self.source, scales), read_array(self.source, scale))
            for codes, scales, scale in zip(*rows, strict=True)
        ]
        try:
            new_codes, new_scales, new_scale = (read_array(self.target, name) for name in names)
        except (SystemFailure, SourceChanged) as e:
            return f": {e}"
        try:
            for i, one in enumerate(sides):
                for other in sides[:i]:
                    if not nvfp4.agree_up_to_scaling(one, other, reciprocal=reciprocal):
                        return ": its sides differ by more than their scaling"
            covering = nvfp4.widest([side[2] for side in sides], reciprocal=reciprocal)
            wanted = {covering.tobytes()}
            if unify:
                wanted |= self._fused_scales(module, names[2].rpartition(".")[2])
            if (
                new_scale.tobytes() not in wanted
                or nvfp4.widest([new_scale, covering], reciprocal=reciprocal) != new_scale
            ):
                return f": its scale {new_scale.item():.9g} is not the one that covers {covering.item():.9g}"
            for side in sides:
                again = nvfp4.repack(*side, new_scale, reciprocal=reciprocal)
                if [part.tobytes() for part in again] == [new_codes.tobytes(), new_scales.tobytes()]:
                    return None
        except ValueError as e:
            return f": {e}"
        return ": it is none of its sides encoded anew to its scale"

    def _fused_scales(self, module: str, suffix: str) -> set[bytes]:
        """The scales of the linears beside `module` that a consumer fuses with it, in DST."""
        parent, _, name = module.rpartition(".")
        return {
            read_array(self.target, f"{parent}.{sibling}.{suffix}").tobytes()
            for fused in FUSED
            if name in fused
            for sibling in fused
            if f"{parent}.{sibling}.{suffix}" in self.target.tensors and sibling != name
        }

    def _check_unified(self) -> None:
        """Linears that a consumer fuses have one scale in DST, where they are encoded alike and scaled soundly."""
        sets: dict[tuple[str, int], dict[str, int]] = {}
        for key in self.target.tensors:
            module, _, suffix = key.rpartition(".")
            parent, _, word = module.rpartition(".")
            for b, blob in enumerate(BLOBS):
                names = [f"{module}.{part}" for part in blob]
                if suffix != blob[2] or any(name not in self.target.tensors for name in names):
                    continue
                if is_blob([self.target.tensors[name] for name in names]):
                    for f, fused in enumerate(FUSED):
                        if word in fused:
                            sets.setdefault((parent, f), {})[key] = b
        for keys in sets.values():
            if len({self.after.digests[key] for key in keys}) > 1 and len(set(keys.values())) == 1:
                scales = [read_array(self.target, key).item() for key in keys]
                if all(0 < scale < float("inf") for scale in scales):
                    said = ", ".join(f"{key} {scale:.9g}" for key, scale in zip(keys, scales, strict=True))
                    self._say("not-unified", next(iter(keys)), f"fused linears have different scales: {said}")

    # -- KV-cache scales ------------------------------------------------------------------------------------------

    def _kv_scales(self, groups: Iterable[Group], taken: Collection[str]) -> dict[str, Stand]:
        """KV-cache scales that DST holds merged, where that is legitimate: on request, under confirmed ties."""
        if self._option("kv_scales") == "keep":
            return {}
        modules: dict[str, dict[str, tuple[str, Companion]]] = {}
        families = formats.detect(self.source.config, self.source.quant_config, self.source.tensors.keys())
        for key in self.source.tensors:
            hit = formats.kv_scale(key, families) or formats.kv_scale(key)
            if hit is not None and key not in taken:
                modules.setdefault(hit[0], {})[hit[1]] = key, hit[2]
        pairs: dict[str, dict[tuple[str, ...], str]] = {}
        blocked: set[str] = set()
        for group in groups:
            for slot in group.tie.slots:
                sides = tuple(name.rpartition(".")[0].rpartition(".")[0] for name in slot)
                if len(set(sides)) == len(sides) > 1 and all(sides):
                    pairs.setdefault(sides[0], {}).setdefault(sides, group.tie.id)
                    if group.reason is not None:
                        blocked.add(sides[0])
        stands: dict[str, Stand] = {}
        for canonical, found in pairs.items():
            sides, owner = next(iter(found.items()))
            parts = [modules.get(side, {}) for side in sides]
            if canonical in blocked or not self._kv_agree(parts):
                continue
            for rest in dict.fromkeys(rest for part in parts for rest in part):
                there = [part[rest] for part in parts if rest in part]
                keys = tuple(key for key, _ in there)
                target = f"{canonical}.{rest}"
                gone = all(key not in self.target.tensors for key in keys if key != target)
                entries = [self.source.tensors[key] for key in keys]
                if there[0][1].merge is not None and why_no_value(entries) is not None:
                    continue
                if keys != (target,) and gone and target in self.target.tensors:
                    stands[target] = Stand(target, keys, there[0][1], owner)
        return stands

    def _kv_agree(self, parts: Sequence[Mapping[str, tuple[str, Companion]]]) -> bool:
        """Sides whose keys or values are also shifted (a bias) stand for each other only where all of it is equal."""
        if not any(companion.merge is None for part in parts for _, companion in part.values()):
            return True
        with_any = [part for part in parts if part]
        names = set().union(*with_any)
        for rest in names:
            keys = [part[rest][0] for part in with_any if rest in part]
            if len(keys) != len(with_any) and with_any[0].get(rest, next(iter(with_any[0].values())))[1].merge is None:
                return False
            if len({self.before.digests[key] for key in keys}) > 1:
                return False
        return True

    # -- the manifest ---------------------------------------------------------------------------------------------

    def _check_manifest(self, stands: Mapping[str, Stand], groups: Sequence[Group]) -> None:
        """Every statement of the manifest about tensors and groups, against the bytes."""
        assert self.manifest is not None
        say = lambda message: self._say("manifest", MANIFEST_NAME, message)  # noqa: E731
        expected = [{"name": shard.name, "size": shard.size} for shard in self.source.shards]
        if self.manifest["source"]["shards"] != expected:
            say("names other source shards, or other sizes, than SRC has")
        told: dict[str, tuple[str, Mapping[str, Any]]] = {}
        statuses: dict[str, str] = {}
        aliases = 0
        for group in self.manifest["groups"]:
            statuses[group["id"]] = group["status"]
            statuses.setdefault(group["canonical"], group["status"])
            aliases += len(group["aliases"])
            for name, entry in group["tensors"].items():
                if name in told:
                    say(f"lists '{name}' twice")
                told[name] = group["id"], entry
            # Where fused scales were unified, groups that were not rewritten have tensors too.
            changed = any(entry["action"] != "repack" for entry in group["tensors"].values())
            if (group["status"] == "rewritten") != bool(group["tensors"]) and (
                changed or group["status"] == "rewritten" or not self._option("unify_fused_scales")
            ):
                say(f"says that '{group['id']}' is {group['status']}, with {len(group['tensors'])} tensors")
        if aliases != len(self.manifest["ties"]["map"]) or len(self.manifest["groups"]) != len(
            {group["id"] for group in self.manifest["groups"]}
        ):
            say("its groups and its map of ties do not fit together")
        for name, (_, entry) in told.items():
            self._check_entry(name, entry, stands.get(name))
        for name, stand in stands.items():
            if stand.changes and name not in told:
                say(f"does not list '{name}', which stands for {', '.join(stand.sources)}")
        for found in groups:
            status = statuses.get(found.tie.id)
            if found.reason is not None and status in ("rewritten", "canonical"):
                say(f"says that '{found.tie.id}' is {status}; the bytes of SRC do not confirm it: {found.reason}")

    def _check_entry(self, name: str, entry: Mapping[str, Any], stand: Stand | None) -> None:
        """One tensor as the manifest has it."""
        wrong: list[str] = []
        if stand is None or name not in self.target.tensors:
            self._say("manifest", MANIFEST_NAME, f"lists '{name}', which DST does not hold")
            return
        if entry["from"][:1] != [stand.sources[0]] or sorted(entry["from"]) != sorted(stand.sources):
            wrong.append(f"from {', '.join(map(str, entry['from']))}; expected {', '.join(stand.sources)}")
        if entry["blake3"] != self.after.digests[name].hex():
            wrong.append("blake3 is not the digest of its bytes in DST")
        if entry["action"] != stand.action and not (entry["action"] == "repack" and self._is_repacked(name)):
            wrong.append(f"action {entry['action']}; expected {stand.action}")
        scale = self.scales.get(name)
        if entry["merged"] is not (scale is not None):
            wrong.append(f"merged is {entry['merged']}")
        elif scale is not None:
            ratio = entry.get("ratio")
            if type(ratio) not in (float, int, type(None)) or not _close(ratio, scale.ratio):
                wrong.append(f"ratio {ratio}; expected {scale.ratio}")
            if entry.get("calibrated") is not scale.calibrated:
                wrong.append(f"calibrated {entry.get('calibrated')}; expected {scale.calibrated}")
        for text in wrong:
            self._say("manifest", MANIFEST_NAME, f"'{name}': {text}")


def _close(told: float | None, found: float | None) -> bool:
    if told is None or found is None:
        return told is found
    return told == found or abs(told - found) <= 1e-9 * abs(found)
