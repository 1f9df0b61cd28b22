"""Compares what the nodes wrote, names the bad ones, and says whether the run may go on without them."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cpt_merge.cluster.preflight.begin import NONCE_FILE
from cpt_merge.cluster.preflight.report import NodeReport, folder_of, read_nodes, wait_until
from cpt_merge.core.artifact import write_json
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import say
from cpt_merge.launcher.recipe import Recipe

VERDICT_FILE = "verdict.json"
SKEW = 5.0  # seconds
ADVICE = {
    "code": "; copy the project there anew, or keep one copy on the shared file system",
    "recipe": "; copy the recipe there anew, or keep one copy on the shared file system",
    "packages": "; install there what the others have (constraints.txt)",
    "GPUs": "; ask Slurm for one kind of node (--constraint)",
    "driver": "",
}
NOTED = ("driver",)  # worth a line, but no reason to do without a node


@dataclass
class Verdict:
    """What is wrong with each node (bad if anything is), what is worth a note, and what it has."""

    nodes: list[str]
    faults: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    facts: dict[str, list[str]] = field(default_factory=dict)
    processes_left: int | None = (
        None  # of training on the nodes that are not bad, where the network test has shown it
    )

    def blame(self, node: str, sentence: str) -> None:
        """Count the node as bad."""
        self.faults.setdefault(node, []).append(sentence)

    def note(self, node: str, sentence: str) -> None:
        """Say it, no more."""
        self.notes.setdefault(node, []).append(sentence)


def judge_nodes(recipe: Recipe, nodes: list[str], wait: float) -> Verdict:
    """Wait until all nodes have reported, `wait` seconds at most, and compare them."""
    folder = folder_of(recipe)
    if not (folder / NONCE_FILE).is_file():
        raise UserError(
            f"{folder} has no {NONCE_FILE}; call `cpt-merge preflight RECIPE --begin` first."
        )
    nonce = json.loads((folder / NONCE_FILE).read_text(encoding="utf-8"))["nonce"]
    reports: dict[str, NodeReport] = {}

    def all_there() -> bool:
        reports.update(read_nodes(folder))
        return all(node in reports and not reports[node].doing for node in nodes)

    wait_until(all_there, wait)
    verdict = Verdict(nodes, facts={node: reports[node].facts for node in nodes if node in reports})
    for node in nodes:
        for sentence in _own_faults(reports.get(node), nonce, wait, folder):
            verdict.blame(node, sentence)
    ended = {node: reports[node] for node in nodes if node in reports and not reports[node].doing}
    _compare(ended, verdict)
    compare_clocks({node: report.clock for node, report in ended.items()}, verdict)
    return verdict


def _own_faults(report: NodeReport | None, nonce: str, wait: float, folder: Path) -> list[str]:
    """What is wrong with one node whatever the others have."""
    if report is None:
        return [
            f"no report within {wait:g} s; the node or its task is gone, or it does not see {folder}: drain it "
            "(scontrol update nodename=NAME state=drain), or mount the file system."
        ]
    unfinished = (
        [f"its check of {report.doing} did not end within {wait:g} s."] if report.doing else []
    )
    stale = (
        ["it reads an old nonce, so it sees what others write too late."]
        if report.nonce not in (None, nonce)
        else []
    )
    return report.problems + unfinished + stale


def _compare(reports: Mapping[str, NodeReport], verdict: Verdict) -> None:
    """What most nodes have is right; of as many, what comes first in the order of nodes."""
    for group in ADVICE:
        values = {
            node: report.same[group] for node, report in reports.items() if group in report.same
        }
        names = sorted({name for value in values.values() for name in value})
        votes = {
            name: Counter(value.get(name, "nothing") for value in values.values()) for name in names
        }
        right = {
            name: votes[name].most_common(1)[0][0] for name in names
        }  # of equals, the one met first
        for node, value in values.items():
            others = [name for name in names if value.get(name, "nothing") != right[name]]
            if others:
                found = ", ".join(
                    f"{name} {value.get(name, 'nothing')} instead of {right[name]}"
                    for name in others
                )
                sentence = f"{group}: {found}, which {_whose(votes[others[0]], len(values))}{ADVICE[group]}."
                (verdict.note if group in NOTED else verdict.blame)(node, sentence)


def _whose(votes: Counter[str], voters: int) -> str:
    """The majority in words, or that there is none."""
    (_, most), (_, second) = votes.most_common(2)
    if most == second:
        return f"as many nodes have ({most} each; that of the first of them is taken as right)"
    return f"{most} of {voters} nodes have"


def compare_clocks(ahead: Mapping[str, float], verdict: Verdict) -> None:
    """Blame the nodes whose clock is far from the middle one; of two nodes, the first one's is taken as right."""
    if not ahead:
        return
    first = next(iter(ahead.values()))
    middle = statistics.median_low(ahead.values()) if len(ahead) > 2 else first
    for node, seconds in ahead.items():
        if abs(seconds - middle) > SKEW:
            late = "ahead of" if seconds > middle else "behind"
            verdict.blame(
                node,
                f"its clock is {abs(seconds - middle):.1f} s {late} the others'; start its time service (chrony).",
            )


def pass_sentence(recipe: Recipe, verdict: Verdict, network: bool) -> None:
    """Say a line per node, keep the verdict, print the bad nodes on stdout, comma-separated.

    The network test's nodes are those that the judge left; what it blamed before stays bad and counts too.
    Raises `UserError` if more than `launch.spare_nodes` are bad, or none is left, or fewer processes do not fit.
    """
    path = folder_of(recipe) / VERDICT_FILE
    earlier: dict[str, list[str]] = {}
    if network and path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))["bad"]
        earlier = {node: faults for node, faults in kept.items() if node not in verdict.nodes}
    nodes = f"{len(verdict.nodes)} node{'s' * (len(verdict.nodes) != 1)}"
    say(f"preflight{' (network)' if network else ''}: {nodes}, reports in {path.parent}")
    for node in verdict.nodes:
        _say_node(node, verdict)
    bad = earlier | {node: verdict.faults[node] for node in verdict.nodes if node in verdict.faults}
    write_json(path, {"nodes": verdict.nodes, "bad": bad, "notes": verdict.notes})
    print(",".join(bad), flush=True)
    if not bad:
        return
    names, spare, left = (
        ", ".join(bad),
        recipe.launch.spare_nodes,
        len(verdict.nodes) - len(verdict.faults),
    )
    if len(bad) > spare or not left:
        more = f", or set launch.spare_nodes = {len(bad)} to go on without" if left else ""
        raise UserError(
            f"preflight: {names} cannot be used, for the reasons above; mend that, leave them out (--exclude){more}."
        )
    if verdict.processes_left:
        recipe.training.check_processes(verdict.processes_left, f" (without {names})")
    say(f"preflight: going on without {names} (launch.spare_nodes = {spare})")


def _say_node(node: str, verdict: Verdict) -> None:
    for sentence in verdict.faults.get(node, []):
        say(f"  BAD   {node}: {sentence}")
    for sentence in verdict.notes.get(node, []):
        say(f"  note  {node}: {sentence}")
    if node not in verdict.faults:
        say(f"  ok    {node}: {', '.join(verdict.facts.get(node, []))}")
