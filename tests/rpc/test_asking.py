"""A request that is repeated follows the operation that it asked for first."""

from __future__ import annotations

from typing import Any

import pytest

from banger import proc
from banger.config import Config, Dirs
from banger.errors import AlreadyExists, InvalidRequest
from banger.events import queries, work
from banger.events import vocabulary as ev
from banger.events.log import EventLog
from banger.rpc import protocol as p
from banger.rpc.service import Service


@pytest.fixture
def service(dirs: Dirs, log: EventLog) -> Service:
    return Service(dirs, Config(), log, since_us=0, stop=lambda: None)


def end(log: EventLog, op: str) -> None:
    with log.transaction() as tx:
        tx.append(op, ev.OpEnded(fate="done"), op=op)


def stopped(service: Service, name: str = "web") -> dict[str, Any]:
    """A VM that is made, with nothing under way."""
    made = service.answer(p.VmCreate(name=name))
    with service.log.transaction() as tx:
        tx.append(made["vm"], ev.VmCreated(image_digest="i", kernel_digest="k"))
    end(service.log, made["op"])
    return made


def test_a_key_gives_the_first_operation_for_ever(service: Service, log: EventLog) -> None:
    """Repeated with its key, a request is answered with the first operation, also when it has ended."""
    asked = p.VmCreate(memory_mib=256, key="run-1")
    first = service.answer(asked)
    again = service.answer(asked)
    assert again == first | {"joined": True}
    end(log, first["op"])
    assert service.answer(asked)["op"] == first["op"]
    assert len(queries.ops(log, limit=-1)) == 1


def test_a_key_outlives_the_vm(service: Service, log: EventLog) -> None:
    """A delete that is repeated after the VM is gone gives the first delete, not `not found`."""
    vm = stopped(service)["vm"]
    first = service.answer(p.VmDelete(vm="web", key="bye"))
    with log.transaction() as tx:
        tx.append(vm, ev.VmDeleted(), op=first["op"])
    end(log, first["op"])
    assert service.answer(p.VmDelete(vm="web", key="bye"))["op"] == first["op"]


def test_a_key_belongs_to_one_request(service: Service, log: EventLog) -> None:
    """The same key with another request is refused, naming the operation, and nothing is asked for."""
    first = service.answer(p.VmCreate(name="web", key="k"))
    for other in (p.VmCreate(name="web", vcpu=2, key="k"), p.VmDelete(vm="web", key="k")):
        with pytest.raises(InvalidRequest, match="used for another request") as refused:
            service.answer(other)
        assert refused.value.op == first["op"]
    assert len(queries.ops(log, limit=-1)) == 1


@pytest.mark.parametrize("key", ["", " ", "a b", "x" * 129, "ü", "a\n"])
def test_what_is_no_key_is_refused(service: Service, log: EventLog, key: str) -> None:
    """Up to 128 printable ASCII characters without spaces, and nothing else."""
    with pytest.raises(InvalidRequest, match="idempotency key"):
        service.answer(p.VmCreate(name="web", key=key))
    assert log.read() == []


def test_an_identical_create_joins_the_first(service: Service, log: EventLog) -> None:
    """While the VM is being made, the same request follows the same operation; then the name is taken."""
    first = service.answer(p.VmCreate(name="web", memory_mib=256))
    assert service.answer(p.VmCreate(name="web", memory_mib=256)) == first | {"joined": True}
    for other in (
        p.VmCreate(name="web", memory_mib=512),
        p.VmCreate(name="web", memory_mib=256, start=False),
        p.VmCreate(name="web", memory_mib=256, join=False),
        p.VmCreate(name="web", memory_mib=256, ephemeral=True),
    ):
        with pytest.raises(AlreadyExists):
            service.answer(other)
    end(log, first["op"])
    with pytest.raises(AlreadyExists):
        service.answer(p.VmCreate(name="web", memory_mib=256))


@pytest.mark.parametrize("verb", [p.VmStart, p.VmStop, p.VmRestart, p.VmKill, p.VmDelete])
def test_an_identical_request_joins_the_newest_of_its_lane(
    service: Service, log: EventLog, verb: type[p.ChangesVm]
) -> None:
    """Joined while it is the last thing asked for; after another request it is asked for anew."""
    stopped(service)
    first = service.answer(verb(vm="web"))
    assert service.answer(verb(vm="web")) == first | {"joined": True}
    if verb is not p.VmDelete:
        other = p.VmStop if verb is not p.VmStop else p.VmStart
        service.answer(other(vm="web"))
        assert service.answer(verb(vm="web"))["op"] != first["op"]


def test_a_cancelled_operation_is_not_joined(service: Service, log: EventLog) -> None:
    """Whoever asks after a cancellation gets an operation that will be done."""
    stopped(service)
    first = service.answer(p.VmStart(vm="web"))
    log.cancel(first["op"])
    assert service.answer(p.VmStart(vm="web"))["op"] != first["op"]


def test_two_builds_of_an_image_are_one(service: Service, log: EventLog) -> None:
    """The second follows the first, whether or not a worker has it already."""
    first = service.answer(p.ImageBuild(image="debian-12"))
    work.claim(log, proc.me())
    assert service.answer(p.ImageBuild(image="debian-12")) == {**first, "joined": True}


@pytest.mark.parametrize(
    "asked",
    [
        p.ImagePull(reference="127.0.0.1:5000/app:1", key="k"),
        p.ImageRegister(name="mine", file="/srv/root.ext4", key="k"),
        p.ImageBuild(image="debian-12", key="k"),
    ],
    ids=lambda asked: asked.method,
)
def test_a_repeated_request_is_answered_as_the_first(service: Service, asked: p.Request) -> None:
    """Whatever was asked for, the answer with the same key has all that the first one had."""
    first = service.answer(asked)
    assert first["name"]
    assert service.answer(asked) == first | {"joined": True}


def test_what_is_asked_for_anew_needs_the_same_room(service: Service, log: EventLog) -> None:
    """`ops retry` of a start that was undone waits for memory as the first one did."""
    stopped(service)
    op = service.answer(p.VmStart(vm="web"))["op"]
    with log.transaction() as tx:
        tx.append(op, ev.OpEnded(fate="undone"), op=op)
    again = service.answer(p.OpsRetry(op=op))["op"]
    first, second = queries.whole_op(log, op).needs, queries.whole_op(log, again).needs
    assert first is not None
    assert first.memory_mib > 0
    assert second == first
