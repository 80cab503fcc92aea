"""Two-word names for VMs whose user gave none."""

from __future__ import annotations

import secrets
from collections.abc import Container

_FIRST = (
    "amber ample azure bold brave brisk calm civil clear cool crisp deep deft eager early fair fast"
    " fine firm fond free fresh glad gold grand green handy happy hardy keen kind large late light"
    " live lucid lucky mild neat new noble nimble pale plain prime proud quick quiet rapid rare ready"
    " royal sharp silent smart snug solid spry steady still stout sunny super swift tidy true vast"
    " vivid warm wide wise young"
).split()
_SECOND = (
    "alder aspen badger bay beech birch bison brook canyon cedar cliff cloud coast comet coral crane"
    " creek delta dune eagle elm ember falcon fern field finch fjord forest fox glade grove hare"
    " harbor hawk heron hill hollow ibis island jay juniper lake lark laurel leaf lily linden lynx"
    " maple marsh meadow mesa moon moss oak orca otter owl pebble pine plover pond poplar raven reef"
    " ridge river robin sage seal shore sparrow spruce star stone swan teal thrush tide trail vale"
    " valley willow wolf wren yew"
).split()


def random_name(taken: Container[str]) -> str:
    """Make a name such as `brisk-otter` that is not taken."""
    while True:
        name = f"{secrets.choice(_FIRST)}-{secrets.choice(_SECOND)}"
        if name not in taken:
            return name
        name += f"-{secrets.randbelow(1000)}"
        if name not in taken:
            return name
