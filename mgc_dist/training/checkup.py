"""The body of `doctor`: what all ranks find, before a job waits for it."""

import json
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import torch

from mgc_dist.bias_model import table as tables
from mgc_dist.cluster.lease import SEEN_WITHIN_S
from mgc_dist.cluster.meeting import Facts, Meeting, address, describe, refuse_others
from mgc_dist.cluster.preflight import Finding, Verdict
from mgc_dist.cluster.ranks import device_of
from mgc_dist.cluster.seat import some_of
from mgc_dist.config import DoctorConfig
from mgc_dist.data import manifest
from mgc_dist.data.reader import ShardSet
from mgc_dist.errors import UserError
from mgc_dist.files import nearest


def all_look(
    config: DoctorConfig,
    meeting: Meeting,
    findings: list[Finding],
    tell: Callable[[list[Finding]], None],
) -> bool:
    """Look at device, data and run folder; rank 0 tells what all have found (a collective).

    Args:
        config: of the command.
        meeting: of the ranks.
        findings: what this rank has found before they met.
        tell: shows findings; called on rank 0.

    Returns:
        Whether all is well, as far as this rank knows; rank 0 knows of all.

    Raises:
        UserError: the ranks have other data.
    """
    findings += _device(config, meeting.seat.local_rank)
    data, ours = _data(config)
    findings += [data, *_shared(config.run, meeting)]
    lines = json.dumps([(each.question, each.verdict, each.sentence) for each in findings])
    where = {"host": socket.gethostname(), "address": address()}
    wrong = [finding for finding in findings if finding.verdict == "wrong"]

    def show(said: list[Facts]) -> None:
        everybodys = _merge([json.loads(facts["found"]) for facts in said])
        ranks = Finding(question="ranks", verdict="ok", sentence=describe(said))
        tell([ranks, *everybodys])
        wrong[:] = [finding for finding in everybodys if finding.verdict == "wrong"]
        same = [{"host": facts["host"], "data": facts["data"]} for facts in said]
        refuse_others(same)

    meeting.all_tell("findings", where | {"found": lines, "data": ours}, show)
    return not wrong


def _merge(said: list[list[list[str]]]) -> list[Finding]:
    """What all ranks have found, a line where several have found the same."""
    answers: dict[str, dict[tuple[str, str], list[int]]] = {}
    for rank, lines in enumerate(said):
        for question, verdict, sentence in lines:
            answers.setdefault(question, {}).setdefault((verdict, sentence), []).append(rank)
    merged = []
    for question, given in answers.items():
        for (verdict, sentence), who in given.items():
            merged.append(
                Finding(
                    question=question,
                    verdict=cast(Verdict, verdict),
                    sentence=sentence if len(given) == 1 else f"rank {some_of(who)}: {sentence}",
                )
            )
    return merged


def _device(config: DoctorConfig, local_rank: int) -> Iterator[Finding]:
    """Which device would this rank compute on?"""
    try:
        device = device_of(config.device, local_rank)
    except UserError as error:
        yield Finding(question="device", verdict="wrong", sentence=_one_line(error))
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU is used"
    yield Finding(question="device", verdict="ok", sentence=f"{device} ({name})")


def _data(config: DoctorConfig) -> tuple[Finding, str]:
    """Which data set and bias table are there? Also in short, to be compared between ranks."""
    if not (config.shards / manifest.NAME).is_file():
        sentence = f"no data set in {config.shards} yet: python -m mgc_dist.shard makes one"
        return Finding(question="data", verdict="note", sentence=sentence), "none"
    table, name = config.table, "no bias table"
    try:
        with ShardSet(config.shards, config.fold) as shards:
            own = shards.manifest
            if (table / tables.HEADER).is_file() or table.is_file():
                name = f"bias table {tables.read(table, own, shards.keys).sha256[:12]}"
    except UserError as error:
        return Finding(question="data", verdict="wrong", sentence=_one_line(error)), str(error)
    said = f"data set {own.dataset_id[:12]}, {name}"
    sentence = f"{said}: {own.rows} segments in {len(own.shards)} shards in {config.shards}"
    return Finding(question="data", verdict="ok", sentence=sentence), said


def _shared(run: Path, meeting: Meeting) -> Iterator[Finding]:
    """Does every rank see what rank 0 writes where the run folder is (a collective)?"""
    if meeting.seat.world == 1:
        return
    if meeting.seat.rank == 0:
        sign = nearest(run.resolve()) / f".doctor-{secrets.token_hex(8)}"
        sign.touch()
        meeting.store.set("sign", str(sign))
    sign = Path(meeting.store.get("sign").decode())
    deadline = time.monotonic() + min(SEEN_WITHIN_S, meeting.wait_s / 2)
    while not (seen := sign.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    meeting.all_tell("view of the run folder", {}, lambda said: sign.unlink())
    if seen:
        yield Finding(question="shared", verdict="ok", sentence=f"all ranks see {sign.parent}")
    else:
        sentence = f"{socket.gethostname()} does not see what rank 0 writes into {sign.parent}"
        cure = "choose a --run on a file system that all nodes share"
        yield Finding(question="shared", verdict="wrong", sentence=f"{sentence}: {cure}")


def _one_line(error: UserError) -> str:
    return " ".join(str(error).split())
