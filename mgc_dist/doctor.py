"""`python -m mgc_dist.doctor`: what goes wrong on clusters, looked at before a job waits for it."""

import json
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, cast

from mgc_dist import cli
from mgc_dist.cluster.lease import SEEN_WITHIN_S
from mgc_dist.cluster.place import some_of
from mgc_dist.cluster.preflight import Finding, Verdict
from mgc_dist.config import DoctorConfig
from mgc_dist.errors import EXIT_BAD_INPUT, UserError
from mgc_dist.files import nearest

if TYPE_CHECKING:
    from mgc_dist.cluster.meeting import Facts, Meeting


def run(config: DoctorConfig) -> int:
    """Look; with several ranks, tell rank 0, which prints what all have found.

    Returns:
        0, or 2 where something is wrong.

    Raises:
        UserError: the ranks cannot meet, or have other code, flags or data.
        PeerLost: a rank does not come.
    """
    from mgc_dist.cluster import preflight
    from mgc_dist.cluster.place import place

    here = place()
    found = preflight.look(here, run=config.run, device=config.device)
    if here.rank == 0:
        found += preflight.lease(config.run)
    if here.world > 1 and any(finding.error for finding in found):  # they might never meet
        print(f"rank {here.rank} on {socket.gethostname()}", flush=True)
        _print(found)
        return EXIT_BAD_INPUT
    from mgc_dist.cluster import meeting as rendezvous

    with rendezvous.meet(cli.flags_of(config), wait_s=config.wait_s) as meeting:
        found += _device(config, here.local_rank)
        data, ours = _data(config)
        found += [data, *_shared(config.run, meeting)]
        lines = json.dumps([(each.question, each.verdict, each.sentence) for each in found])
        where = {"host": socket.gethostname(), "address": rendezvous.address()}
        wrong = [finding for finding in found if finding.verdict == "wrong"]

        def show(said: "list[Facts]") -> None:
            everybodys = _merge([json.loads(facts["found"]) for facts in said])
            _print([Finding(question="ranks", verdict="ok", sentence=rendezvous.describe(said))])
            _print(everybodys)
            wrong[:] = [finding for finding in everybodys if finding.verdict == "wrong"]
            same = [{"host": facts["host"], "data": facts["data"]} for facts in said]
            rendezvous.refuse_others(same)

        meeting.all_tell("findings", where | {"found": lines, "data": ours}, show)
    return EXIT_BAD_INPUT if wrong else 0


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


def _print(found: list[Finding]) -> None:
    for finding in found:
        sign = finding.verdict.upper() if finding.verdict == "wrong" else finding.verdict
        print(f"{sign:<6} {finding.question:<12} {finding.sentence}", flush=True)


def _device(config: DoctorConfig, local_rank: int) -> Iterator[Finding]:
    """Which device would this rank compute on?"""
    import torch

    from mgc_dist.cluster.ranks import device_of

    try:
        device = device_of(config.device, local_rank)
    except UserError as error:
        yield Finding(question="device", verdict="wrong", sentence=_one_line(error))
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU is used"
    yield Finding(question="device", verdict="ok", sentence=f"{device} ({name})")


def _data(config: DoctorConfig) -> tuple[Finding, str]:
    """Which data set and bias table are there? Also in short, to be compared between ranks."""
    from mgc_dist.bias_model import table as logits
    from mgc_dist.data import manifest
    from mgc_dist.data.reader import ShardSet

    if not (config.shards / manifest.NAME).is_file():
        sentence = f"no data set in {config.shards} yet: python -m mgc_dist.shard makes one"
        return Finding(question="data", verdict="note", sentence=sentence), "none"
    table, name = config.table, "no bias table"
    try:
        with ShardSet(config.shards) as shards:
            found = shards.manifest
            if (table / logits.HEADER).is_file() or table.is_file():
                name = f"bias table {logits.read(table, found, shards.keys).sha256[:12]}"
    except UserError as error:
        return Finding(question="data", verdict="wrong", sentence=_one_line(error)), str(error)
    said = f"data set {found.dataset_id[:12]}, {name}"
    sentence = f"{said}: {found.rows} segments in {len(found.shards)} shards in {config.shards}"
    return Finding(question="data", verdict="ok", sentence=sentence), said


def _shared(run: Path, meeting: "Meeting") -> Iterator[Finding]:
    """Does every rank see what rank 0 writes where the run folder is (a collective)?"""
    if meeting.place.world == 1:
        return
    if meeting.place.rank == 0:
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


def main() -> NoReturn:
    """Entry of `python -m mgc_dist.doctor`."""
    cli.main("doctor", DoctorConfig, run)


if __name__ == "__main__":
    main()
