"""The comparison itself: what DST holds against what it has to hold, under one declaration of ties."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from tierewrite.planning.policy import Policy
from tierewrite.proof import Problem
from tierewrite.proof.expected import Expected, agree, expected
from tierewrite.proof.judge import Group, Judge, Stand
from tierewrite.proof.kv import kv_stands
from tierewrite.proof.orphans import orphans
from tierewrite.proof.reading import Contents
from tierewrite.source.table import MANIFEST_NAME, Checkpoint
from tierewrite.tables import some
from tierewrite.ties.on_disk import DiskTies


class Proof:
    """One comparison under one declaration of ties.

    Args:
        source, target: SRC and DST.
        before, after: what they hold.
        policy: the options that the caller names.
        needed: names that stay for a consumer though another tensor stands for them.

    Attributes:
        problems: what is wrong in DST.
        notes: what a reader should know; nothing that is wrong.
        counts: how many tensors of SRC met which fate.
        groups: the declared ties, judged by the bytes of SRC.
        expected: what DST has to hold.
    """

    def __init__(
        self,
        source: Checkpoint,
        target: Checkpoint,
        before: Contents,
        after: Contents,
        policy: Policy,
        needed: Collection[str] = (),
    ) -> None:
        self.source, self.target, self.before, self.after, self.policy = source, target, before, after, policy
        self.needed = needed
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self.counts: dict[str, int] = {}
        self.groups: list[Group] = []
        self.expected = Expected()

    def run(self, disk: DiskTies) -> None:
        """Compares."""
        repack = self.policy.on_mismatch == "repack"
        keep = self.policy.on_mismatch == "keep"
        judge = Judge(self.source, disk, self.before.digests, self.needed, split=keep)
        self.groups = judge.groups((lambda group: agree(self.source, group)) if repack else None)
        stands = self._stands()
        self.expected = expected(self.source, self.before, stands, self.policy)
        self.notes += self.expected.notes
        refuted = {key: group for group in self.groups for key in group.refuted_keys}
        self._say_refused(refuted)
        left = self._left_as_they_were()
        self._compare(refuted, left)
        for name, weight in orphans(self.source.tensors, self.target.tensors.keys(), {*disk.owned, *self.needed}):
            self._say(
                "orphan", name, f"still there, though '{weight}', which it belongs to, is gone; expected both or none"
            )
        self._count()

    def _stands(self) -> dict[str, Stand]:
        """By name in DST, what stands for which tensors of SRC: each of them once."""
        stands: dict[str, Stand] = {}
        for group in self.groups:
            if group.reason is None:
                stands.update(group.stands)
        if self.policy.kv_scales == "merge":
            having = [(key, stand) for stand in stands.values() for key in stand.sources]
            places = {key: None if stand.needed else stand.target for key, stand in having}
            for stand in kv_stands(self.source, self.before.digests, self.groups, places).values():
                stands.update((one.target, one) for one in stand.beside(self.needed))
        placed = {key for stand in stands.values() for key in stand.sources}
        for key in self.source.tensors:
            if key not in placed and key not in stands:
                stands[key] = Stand(key, (key,))
            elif key not in placed:
                self._say("unexpected", key, "its name was given to another tensor, its own bytes have no place")
        return stands

    def _say(self, id: str, where: str, message: str) -> None:
        self.problems.append(Problem(id, where, message))

    def _say_refused(self, refuted: Mapping[str, Group]) -> None:
        """A rewrite that refuses SRC makes no DST at all."""
        refused = dict(self.expected.refused)
        if self.policy.on_mismatch != "keep":
            refused.update((group.tie.id, group.reason) for group in refuted.values() if group.reason is not None)
            refused.update((group.tie.id, group.reason) for group in self.groups if group.reason is not None)
        for group_id, reason in refused.items():
            self._say(
                "refused",
                group_id,
                f"SRC does not confirm this tie ({reason}), so rewriting it with --on-mismatch "
                f"{self.policy.on_mismatch} makes nothing; expected a DST only with --on-mismatch keep",
            )

    def _left_as_they_were(self) -> set[str]:
        """Names of the confirmed ties that DST holds exactly as SRC does, each said once and not tensor by tensor."""
        left: set[str] = set()
        for group in self.groups:
            keys = [key for stand in group.stands.values() for key in stand.sources]
            moves = any(stand.moves for stand in group.stands.values())
            if group.reason is None and moves and all(map(self._same_tensor, keys)):
                self._say("tie-left", group.tie.id, "its sides are one tensor in SRC, but DST still holds both")
                left.update(keys, group.stands)
        return left

    def _same_tensor(self, key: str) -> bool:
        one, other = self.source.tensors[key], self.target.tensors.get(key)
        return (
            other is not None
            and (one.dtype, one.shape) == (other.dtype, other.shape)
            and self.before.digests[key] == self.after.digests[key]
        )

    def _compare(self, refuted: Mapping[str, Group], left: Collection[str]) -> None:
        """Tensor by tensor, but those in `left`."""
        held = set(self.after.digests.values())
        lost: dict[str, list[str]] = {}
        for name, want in self.expected.wants.items():
            stand = self.expected.stands.get(name)
            if name in left:
                continue
            if name in self.target.tensors:
                self._compare_one(name)
            elif stand is None or stand.changes or stand.needed:
                also = f" for {', '.join(stand.sources)}" if stand is not None else f": {want.because}"
                self._say("missing", name, f"not in DST; expected{also}")
            elif stand.sources[0] in refuted:
                lost.setdefault(refuted[stand.sources[0]].tie.id, []).append(stand.sources[0])
            elif want.digest in held:
                self._say("undeclared-drop", name, "gone; equal bytes are there, but no declared tie makes them one")
            else:
                self._say("missing", name, "not in DST; expected")
        reasons = {group.tie.id: group.reason or "; ".join(group.kept.values()) for group in refuted.values()}
        for group, keys in lost.items():
            said = f"{some(keys, 4)} gone, though SRC does not confirm the tie: {reasons[group]}"
            self._say("unconfirmed-drop", group, said)
        sources = {key: stand.target for stand in self.expected.stands.values() for key in stand.sources}
        for name in self.target.tensors:
            if name not in self.expected.wants and name not in left:
                if name in sources:
                    self._say("tie-left", name, f"still there beside '{sources[name]}', which stands for it")
                else:
                    self._say("unexpected", name, "nothing in SRC accounts for it")

    def _compare_one(self, name: str) -> None:
        want, found = self.expected.wants[name], self.target.tensors[name]
        like = want.like
        if (like.dtype, like.shape) != (found.dtype, found.shape):
            self._say(
                "header",
                name,
                f"is {found.dtype} {list(found.shape)}; expected {like.dtype} {list(like.shape)} as '{like.name}'",
            )
        elif self.after.digests[name] != want.digest:
            self._say(want.problem, name, f"holds other bytes; expected {want.because}")

    def _count(self) -> None:
        self.counts = dict.fromkeys(("kept", "renamed", "dropped", "merged", "repacked"), 0)
        for name, stand in self.expected.stands.items():
            fate = "merged" if stand.merge is not None else "renamed" if stand.action == "rename" else "kept"
            self.counts["repacked" if name in self.expected.repacked else fate] += 1
            self.counts["dropped"] += len(stand.sources) - 1


def check_statements(proof: Proof, manifest: Mapping[str, Any]) -> list[Problem]:
    """Every statement of the manifest about tensors and groups, against the bytes of SRC and DST.

    Args:
        proof: the comparison, carried out.
        manifest: of the right form.
    """
    problems: list[Problem] = []

    def say(message: str) -> None:
        problems.append(Problem("manifest", MANIFEST_NAME, message))

    expected_shards = [
        {"name": shard.name, "size": shard.size, "header": shard.header_digest} for shard in proof.source.shards
    ]
    if manifest["source"]["shards"] != expected_shards:
        say("names other source shards, sizes or headers than SRC has")
    listed = manifest.get("output", {}).get("tensors")
    if listed is not None and listed != {name: digest.hex() for name, digest in proof.after.digests.items()}:
        say("lists other digests of all tensors than DST's bytes have")
    told: dict[str, Mapping[str, Any]] = {}
    statuses: dict[str, str] = {}
    names: dict[str, list[str]] = {}
    differing = {group.tie.id: group.kept.keys() for group in proof.groups}
    for group in manifest["groups"]:
        names[group["id"]] = list(group.get("kept_names", ()))
        if group.get("differing_aliases", {}).keys() != differing.get(group["id"], {}.keys()):
            say(f"says of '{group['id']}' that other aliases were kept than those that differ in SRC")
        if group["id"] in statuses:
            say(f"lists the group '{group['id']}' twice")
        statuses[group["id"]] = group["status"]
        for name, entry in group["tensors"].items():
            if name in told:
                say(f"lists '{name}' twice")
            told[name] = entry
    for name, entry in told.items():
        for wrong in _wrong_in_entry(proof, name, entry):
            say(f"'{name}': {wrong}")
    for name, stand in proof.expected.stands.items():
        if stand.changes and name not in told:
            say(f"does not list '{name}', which stands for {', '.join(stand.sources)}")
    _check_groups(proof, statuses, say)
    for group_id, kept in _kept_names(proof).items():
        if names.get(group_id, []) != kept:
            say(f"says of '{group_id}' that {names.get(group_id, [])} stay for a consumer; expected {kept}")
    return problems


def _kept_names(proof: Proof) -> dict[str, list[str]]:
    """For each confirmed tie, the names that stay though another tensor has their value, sorted."""
    kept: dict[str, list[str]] = {group.tie.id: [] for group in proof.groups}
    for name in sorted(proof.expected.stands):
        stand = proof.expected.stands[name]
        if stand.needed and stand.group is not None:
            kept[stand.group].append(name)
    return kept


def _check_groups(proof: Proof, statuses: Mapping[str, str], say: Callable[[str], None]) -> None:
    """The ties that the manifest tells of are those that are declared, with what became of each."""
    declared = {group.tie.id: group for group in proof.groups}
    rewritten = {stand.group for stand in proof.expected.stands.values() if stand.changes}
    for unknown in sorted(statuses.keys() - declared.keys()):
        say(f"tells of the tie '{unknown}', which nobody declares")
    for group_id, group in declared.items():
        status = statuses.get(group_id)
        right = "rewritten" if group_id in rewritten else "canonical"
        if group.reason is not None:
            right = "kept"
        if status is None:
            say(f"does not tell of the declared tie '{group_id}'")
        elif status != right:
            why = f": {group.reason}" if group.reason is not None else ""
            say(f"says that '{group_id}' is {status}; by the bytes of SRC it is {right}{why}")


def _wrong_in_entry(proof: Proof, name: str, entry: Mapping[str, Any]) -> list[str]:
    """What is not true of one tensor as the manifest has it."""
    stand = proof.expected.stands.get(name)
    if stand is None or name not in proof.target.tensors:
        return ["is listed, and DST does not hold it"]
    wrong: list[str] = []
    if entry["from"][:1] != [stand.covered[0]] or sorted(entry["from"]) != sorted(stand.covered):
        wrong.append(f"from {', '.join(map(str, entry['from']))}; expected {', '.join(stand.covered)}")
    if entry["blake3"] != proof.after.digests[name].hex():
        wrong.append("blake3 is not the digest of its bytes in DST")
    action = "repack" if name in proof.expected.repacked else stand.action
    if entry["action"] != action:
        wrong.append(f"action {entry['action']}; expected {action}")
    value = proof.expected.merged.get(name)
    if entry["merged"] is not (value is not None):
        wrong.append(f"merged is {entry['merged']}")
    elif value is not None:
        ratio = entry.get("ratio")
        if type(ratio) not in (float, int, type(None)) or not _close(ratio, value.ratio):
            wrong.append(f"ratio {ratio}; expected {value.ratio}")
        if entry.get("calibrated") is not value.calibrated:
            wrong.append(f"calibrated {entry.get('calibrated')}; expected {value.calibrated}")
    return wrong


def _close(told: float | None, found: float | None) -> bool:
    """Whether two ratios are one; beyond float64's largest a manifest has null."""
    if found is not None and found == float("inf"):
        found = None
    if told is None or found is None:
        return told is found
    return told == found or abs(told - found) <= 1e-9 * abs(found)
