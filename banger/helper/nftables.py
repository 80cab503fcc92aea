"""The messages to nf_tables about our table, as in linux/netfilter/nf_tables.h.

A rule is built from numbers, addresses and names of fixed length; none is ever written as text. Its mark
is in its user data in nft(8)'s form, so that `nft list ruleset` shows it as a comment.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from ipaddress import IPv4Address
from typing import Any

from pyroute2.netlink import NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REQUEST
from pyroute2.netlink.nfnetlink import NFNL_SUBSYS_NFTABLES, nfgen_msg, nftsocket
from pyroute2.netlink.nfnetlink.nftsocket import (
    NFPROTO_INET,
    NFPROTO_IPV4,
    NFPROTO_IPV6,
    Cmp,
    Meta,
    NFTSocket,
    Regs,
)
from pyroute2.nftables.expressions import genex, masq, verdict

from banger.helper.names import TABLE
from banger.helper.net import (
    ForwardIn,
    ForwardOut,
    GuardFrom,
    GuardHost,
    GuardTo,
    Masquerade,
    Rule,
    Wanted,
)

Message = Any
"""A netlink message of pyroute2."""

Expressions = list[Any]
"""A part of a rule: each looks at a packet, and the rule ends at the first that does not match."""

BATCH_BEGIN, BATCH_END = 0x10, 0x11
DROP, ACCEPT = 0, 1
COMMENT = 0
IS, NOT = Cmp.NFT_CMP_EQ, Cmp.NFT_CMP_NEQ
IFNAMSIZ = 16
SOURCE, DESTINATION = 12, 16
"""Where an IPv4 header has its addresses (RFC 791, section 3.1)."""

NETWORK_HEADER = 1
CT_STATE = 0
ESTABLISHED, RELATED, NEW = 2, 4, 8

HOOKS = {
    "input": ("filter", 1, 0),
    "forward": ("filter", 2, 0),
    "postrouting": ("nat", 4, 100),
}
"""Our chains: their type, hook and priority (linux/netfilter_ipv4.h)."""


class RuleMessage(nfgen_msg, nftsocket.nft_contains_expr):  # type: ignore[misc]  # pyroute2 has no types
    """A rule's message whose user data is bytes; pyroute2's own reads nothing but a comment, and fails."""

    prefix = "NFTA_RULE_"
    nla_map = tuple(
        (name, "cdata" if name == "NFTA_RULE_USERDATA" else kind)
        for name, kind in nftsocket.nft_rule_msg.nla_map
    )


def opened() -> Any:
    """Open a socket that reads rules as RuleMessage."""
    nft = NFTSocket(nfgen_family=NFPROTO_INET)
    nft.register_policy(NFNL_SUBSYS_NFTABLES << 8 | nftsocket.NFT_MSG_NEWRULE, RuleMessage)
    return nft


def listing() -> tuple[Message, int]:
    """Ask for the rules of our table."""
    return _message(RuleMessage, 0, 0, RULE_TABLE=TABLE), nftsocket.NFT_MSG_GETRULE


def rule(message: Message) -> Rule:
    """Read one rule from the answer to `listing`."""
    return Rule(
        handle=message.get_attr("NFTA_RULE_HANDLE"),
        chain=message.get_attr("NFTA_RULE_CHAIN"),
        comment=_comment(message.get_attr("NFTA_RULE_USERDATA") or b""),
    )


def change(add: Sequence[Wanted], remove: Sequence[Rule]) -> list[Message]:
    """Make one transaction: our table and chains are there, these rules are gone, those are there."""
    return _transaction([*_table(), *map(_removed, remove), *map(_added, add)])


def removal() -> list[Message]:
    """Make the transaction that removes our table."""
    return _transaction([_message(nftsocket.nft_table_msg, nftsocket.NFT_MSG_DELTABLE, 0, TABLE_NAME=TABLE)])


# -- messages --------------------------------------------------------------------------------------


def _message(kind: type[Any], number: int, flags: int, **attributes: Any) -> Message:
    message = kind()
    message["header"]["type"] = NFNL_SUBSYS_NFTABLES << 8 | number
    message["header"]["flags"] = NLM_F_REQUEST | NLM_F_ACK | flags
    message["nfgen_family"] = NFPROTO_INET
    message["attrs"] = [(f"NFTA_{name}", value) for name, value in attributes.items()]
    return message


def _transaction(messages: Sequence[Message]) -> list[Message]:
    return [_boundary(BATCH_BEGIN), *messages, _boundary(BATCH_END)]


def _boundary(number: int) -> Message:
    message = nfgen_msg()
    message["header"]["type"] = number
    message["header"]["flags"] = NLM_F_REQUEST
    message["res_id"] = NFNL_SUBSYS_NFTABLES
    return message


def _table() -> list[Message]:
    table = _message(nftsocket.nft_table_msg, nftsocket.NFT_MSG_NEWTABLE, NLM_F_CREATE, TABLE_NAME=TABLE)
    return [table, *map(_chain, HOOKS)]


def _chain(name: str) -> Message:
    kind, hook, priority = HOOKS[name]
    place = {"attrs": [("NFTA_HOOK_HOOKNUM", hook), ("NFTA_HOOK_PRIORITY", priority)]}
    return _message(
        nftsocket.nft_chain_msg,
        nftsocket.NFT_MSG_NEWCHAIN,
        NLM_F_CREATE,
        CHAIN_TABLE=TABLE,
        CHAIN_NAME=name,
        CHAIN_HOOK=place,
        CHAIN_TYPE=kind,
        CHAIN_POLICY=ACCEPT,
    )


def _removed(rule: Rule) -> Message:
    return _message(
        RuleMessage,
        nftsocket.NFT_MSG_DELRULE,
        0,
        RULE_TABLE=TABLE,
        RULE_CHAIN=rule.chain,
        RULE_HANDLE=rule.handle,
    )


def _added(wanted: Wanted) -> Message:
    """Add a rule; one that lets through comes before all, a guard behind them."""
    behind = NLM_F_APPEND if isinstance(wanted, GuardFrom | GuardTo | GuardHost) else 0
    chain, expressions = _spelled(wanted)
    return _message(
        RuleMessage,
        nftsocket.NFT_MSG_NEWRULE,
        NLM_F_CREATE | behind,
        RULE_TABLE=TABLE,
        RULE_CHAIN=chain,
        RULE_EXPRESSIONS=expressions,
        RULE_USERDATA=_user_data(wanted.comment),
    )


def _user_data(comment: str) -> bytes:
    """Spell a comment as nft(8) does: a type, a length, and text with a NUL (libnftnl, udata.c)."""
    text = comment.encode("ascii") + b"\0"
    return bytes((COMMENT, len(text))) + text


def _comment(user_data: bytes) -> str | None:
    """Read the comment that user data begins with; None for what does not begin with one."""
    if len(user_data) < 2 or user_data[0] != COMMENT:
        return None
    return user_data[2 : 2 + user_data[1]].rstrip(b"\0").decode("ascii", "replace")


# -- rules -----------------------------------------------------------------------------------------


def _spelled(wanted: Wanted) -> tuple[str, Expressions]:
    """Give the chain of a rule, and its expressions."""
    match wanted:
        case Masquerade():
            return "postrouting", [*_address(SOURCE, wanted.address), *_out(wanted.egress), *masq()]
        case ForwardOut():
            # What conntrack calls invalid is not masqueraded, and would leave with the VM's own address.
            states = NEW | ESTABLISHED | RELATED
            way = [*_in(wanted.bridge), *_out(wanted.egress), *_address(SOURCE, wanted.address)]
            return "forward", [*way, *_states(states), *verdict(ACCEPT)]
        case ForwardIn():
            way = [*_in(wanted.egress), *_out(wanted.bridge), *_address(DESTINATION, wanted.address)]
            return "forward", [*way, *_states(ESTABLISHED | RELATED), *verdict(ACCEPT)]
        case GuardFrom():
            # With br_netfilter what one VM sends another comes by here too, from the bridge to itself.
            return "forward", [*_in(wanted.bridge), *_out(wanted.bridge, NOT), *verdict(DROP)]
        case GuardTo():
            return "forward", [*_out(wanted.bridge), *_in(wanted.bridge, NOT), *verdict(DROP)]
        case GuardHost():
            return "input", [*_in(wanted.bridge), *_family(NFPROTO_IPV6), *verdict(DROP)]


def _in(name: str, op: Cmp = IS) -> Expressions:
    return [_load("meta", Meta.NFT_META_IIFNAME), _compare(_padded(name), op)]


def _out(name: str, op: Cmp = IS) -> Expressions:
    return [_load("meta", Meta.NFT_META_OIFNAME), _compare(_padded(name), op)]


def _family(family: int) -> Expressions:
    return [_load("meta", Meta.NFT_META_NFPROTO), _compare(bytes([family]))]


def _address(offset: int, address: IPv4Address) -> Expressions:
    where = {"dreg": Regs.NFT_REG_1, "base": NETWORK_HEADER, "offset": offset, "len": 4}
    return [*_family(NFPROTO_IPV4), genex("payload", where), _compare(address.packed)]


def _states(states: int) -> Expressions:
    of_interest = {
        "sreg": Regs.NFT_REG_1,
        "dreg": Regs.NFT_REG_1,
        "len": 4,
        "mask": _value(struct.pack("=I", states)),
        "xor": _value(bytes(4)),
    }
    return [_load("ct", CT_STATE), genex("bitwise", of_interest), _compare(bytes(4), NOT)]


def _load(of: str, key: int) -> Any:
    return genex(of, {"dreg": Regs.NFT_REG_1, "key": key})


def _compare(value: bytes, op: Cmp = IS) -> Any:
    return genex("cmp", {"sreg": Regs.NFT_REG_1, "op": op, "data": _value(value)})


def _value(value: bytes) -> Any:
    return {"attrs": [("NFTA_DATA_VALUE", value)]}


def _padded(name: str) -> bytes:
    return name.encode("ascii").ljust(IFNAMSIZ, b"\0")
