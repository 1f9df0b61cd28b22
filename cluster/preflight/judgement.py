"""Compares the nodes' reports, names bad nodes, decides whether the job may run without them."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cpt_merge.cluster.preflight.reports import NONCE_FILE, NodeReport, folder_of, read_nodes
from cpt_merge.core.artifact import write_json
from cpt_merge.core.distributed import wait_for
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import counted, say
from cpt_merge.launcher.recipe import Recipe

JUDGEMENT_FILE = "judgement.json"
SKEW = 5.0  # seconds between clocks
ADVICE = {  # by what must be the same on all nodes
    "code": "; copy the project there again, or keep one copy on the shared file system",
    "recipe": "; copy the recipe there again, or keep one copy on the shared file system",
    "packages": "; install the same versions there (constraints.txt)",
    "GPUs": "; ask Slurm for one kind of node (--constraint)",
    "driver": "",
}
NOTED = ("driver",)  # worth a note, but no reason to leave a node out


@dataclass
class Judgement:
    """For each node: its faults (a node with any is bad), notes, and facts to print."""

    nodes: list[str]
    faults: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    facts: dict[str, list[str]] = field(default_factory=dict)
    processes_left: int | None = None  # of training on the good nodes; the network test knows it

    def blame(self, node: str, sentence: str) -> None:
        """Count the node as bad."""
        self.faults.setdefault(node, []).append(sentence)

    def note(self, node: str, sentence: str) -> None:
        """Print the sentence, no more."""
        self.notes.setdefault(node, []).append(sentence)


def judge_nodes(recipe: Recipe, nodes: list[str], wait: float) -> Judgement:
    """Wait at most `wait` seconds until all nodes have reported, and compare them."""
    folder = folder_of(recipe)
    if not (folder / NONCE_FILE).is_file():
        raise UserError(
            f"{folder} has no {NONCE_FILE}; call `cpt-merge preflight RECIPE --begin` first."
        )
    nonce = json.loads((folder / NONCE_FILE).read_text(encoding="utf-8"))["nonce"]
    reports: dict[str, NodeReport] = {}

    def all_have_reported() -> bool:
        reports.update(read_nodes(folder))
        return all(node in reports and not reports[node].doing for node in nodes)

    wait_for(all_have_reported, "the reports of all nodes", timeout=wait)
    facts = {node: reports[node].facts for node in nodes if node in reports}
    judgement = Judgement(nodes, facts=facts)
    for node in nodes:
        for sentence in _faults_of(reports.get(node), nonce, wait, folder):
            judgement.blame(node, sentence)
    ended = {node: reports[node] for node in nodes if node in reports and not reports[node].doing}
    _compare(ended, judgement)
    compare_clocks({node: report.clock for node, report in ended.items()}, judgement)
    return judgement


def _faults_of(report: NodeReport | None, nonce: str, wait: float, folder: Path) -> list[str]:
    """What is wrong with one node, independent of the others."""
    if report is None:
        return [
            f"no report within {wait:g} s; the node or its task is gone, or it does not see "
            f"{folder}: drain it (scontrol update nodename=NAME state=drain), or mount the file "
            "system."
        ]
    found = list(report.problems)
    if report.doing:
        found.append(f"its check of {report.doing} did not end within {wait:g} s.")
    if report.nonce not in (None, nonce):
        found.append("it reads an old nonce, so it sees what others write too late.")
    return found


def _compare(reports: Mapping[str, NodeReport], judgement: Judgement) -> None:
    """Take the value that most nodes have as right; of a tie, the one that comes first."""
    for group, advice in ADVICE.items():
        values = {
            node: report.same[group] for node, report in reports.items() if group in report.same
        }
        names = sorted({name for value in values.values() for name in value})
        votes = {
            name: Counter(value.get(name, "nothing") for value in values.values()) for name in names
        }
        right = {name: votes[name].most_common(1)[0][0] for name in names}
        for node, value in values.items():
            wrong = [name for name in names if value.get(name, "nothing") != right[name]]
            if wrong:
                found = ", ".join(
                    f"{name} {value.get(name, 'nothing')} instead of {right[name]}"
                    for name in wrong
                )
                whose = _majority(votes[wrong[0]], len(values))
                sentence = f"{group}: {found}, which {whose}{advice}."
                (judgement.note if group in NOTED else judgement.blame)(node, sentence)


def _majority(votes: Counter[str], voters: int) -> str:
    (_, most), (_, second) = votes.most_common(2)
    if most == second:
        return f"as many nodes have ({most} each; the first of them is taken as right)"
    return f"{most} of {voters} nodes have"


def compare_clocks(ahead: Mapping[str, float], judgement: Judgement) -> None:
    """Blame nodes whose clock is far from the median, or from the first one's of two."""
    if not ahead:
        return
    first = next(iter(ahead.values()))
    middle = statistics.median_low(ahead.values()) if len(ahead) > 2 else first
    for node, seconds in ahead.items():
        if abs(seconds - middle) > SKEW:
            late = "ahead of" if seconds > middle else "behind"
            judgement.blame(
                node,
                f"its clock is {abs(seconds - middle):.1f} s {late} the others; "
                "start its time service (chrony).",
            )


def announce(recipe: Recipe, judgement: Judgement, network: bool = False) -> None:
    """Report each node on a line, save the judgement, print the bad nodes on stdout as A,B.

    The network test judges the nodes that the first judgement left; bad ones of the first stay bad
    and count. Raises `UserError` if more than `launch.spare_nodes` are bad, if no node is left, or
    if the batch does not divide over the processes that are left.
    """
    path = folder_of(recipe) / JUDGEMENT_FILE
    earlier: dict[str, list[str]] = {}
    if network and path.is_file():
        saved = json.loads(path.read_text(encoding="utf-8"))["bad"]
        earlier = {node: faults for node, faults in saved.items() if node not in judgement.nodes}
    nodes = counted(len(judgement.nodes), "node")
    say(f"preflight{' (network)' if network else ''}: {nodes}, reports in {path.parent}")
    for node in judgement.nodes:
        for sentence in judgement.faults.get(node, []):
            say(f"  BAD   {node}: {sentence}")
        for sentence in judgement.notes.get(node, []):
            say(f"  note  {node}: {sentence}")
        if node not in judgement.faults:
            say(f"  ok    {node}: {', '.join(judgement.facts.get(node, []))}")
    bad = dict(earlier)
    bad.update(
        {node: judgement.faults[node] for node in judgement.nodes if node in judgement.faults}
    )
    write_json(path, {"nodes": judgement.nodes, "bad": bad, "notes": judgement.notes})
    print(",".join(bad), flush=True)
    if not bad:
        return
    names, spare = ", ".join(bad), recipe.launch.spare_nodes
    left = len(judgement.nodes) - len(judgement.faults)
    if len(bad) > spare or not left:
        without = f", or set launch.spare_nodes = {len(bad)} to run without them" if left else ""
        raise UserError(
            f"preflight: {names} cannot be used, for the reasons above; "
            f"fix that, leave them out (--exclude){without}."
        )
    if judgement.processes_left:
        recipe.check_processes(judgement.processes_left, f" (without {names})")
    say(f"preflight: continuing without {names} (launch.spare_nodes = {spare})")
