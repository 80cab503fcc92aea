"""The pages that are static text, so that printing them costs nothing."""

from __future__ import annotations

TOP = """\
banger: disposable virtual machines whose every step is on record

  banger vm run --rm ./repo -- make test      a fresh machine runs one command in a checkout of
                                              your repository and is gone; its exit code is yours

A machine has its own kernel, root file system, /root disk and name. Every request is an
operation, op-XXXXXX: it survives the death of any process, and a failed one is undone.

Machines
  vm run        create one and go inside, or run a command in it, with a repository or without
  vm create     create one and start it
  vm exec       run a command in one, its words exactly as typed
  vm workspace prepare, export      bring a repository into one; its changes back as a patch
  vm exec -d    leave it running there: vm jobs, attach, wait, kill-job; vm logs --job
  vm cp         copy files in, or out
  vm ssh        open a shell in one
  vm list       which there are (also: banger ps)
  vm show       all about one
  vm logs       what its console said
  vm history    what was done to it; vm why: its last failure (both also when it is gone)
  vm start, stop, restart, kill, delete
  vm set        more CPUs, memory or disk; let it reach the network, or not
  vm ping, health, ports, stats     is one alive, is it well, what does it serve, what does it use
  vm prune      delete all that are stopped; vm touch: keep an idle one running

Operations
  ops list      what was asked for, and what became of it
  ops show      one, step by step
  ops follow    watch one, from its first event
  ops cancel    stop one and undo it
  ops retry     go on with one that is stuck, or ask again for one that was undone
  ops retry-undo, abandon           undo one that is stuck, or give it up
  ops audit     is anything left on the host that is nobody's?
  ops bundle    all about one in a file, for a bug report

  events list, tail, export, verify     the log that all of this is made from
  state rebuild, salvage                make it again from the log; go on after damage

Images and kernels
  image list, show, pull, build, register, promote, delete
  image cache prune
  kernel list, show, pull, import, delete

This host
  doctor        is it fit, and what to do if not
  ssh-config install, uninstall, show     `ssh NAME.vm`, scp and editors reach VMs
  daemon start, status, stop        (any command that needs the daemon starts it)

Every command takes --json (or -o json), and --help with examples.
`banger help exit-codes` lists the exit codes.
"""

EXIT_CODES = """\
Exit codes

  0    done
  1    something inside banger went wrong
  2    usage: the command or the request is not valid
  3    not found
  4    busy: in use, exists already, or in a state that does not allow it
  5    the daemon does not answer, or could not be started
  6    the operation failed, or was cancelled, and was undone
  7    the operation is stuck: it could be neither finished nor undone
  8    this host lacks something (`banger doctor` tells what)
  9    the guest cannot be reached, or is not well (`banger vm health`)
  130  Ctrl-C; an operation that was being waited for goes on

Ctrl-C while you wait for an operation asks, on a terminal, whether to detach (130), to cancel it (6,
once it is undone) or to go on waiting. Elsewhere --on-interrupt decides: detach, unless it is cancel.

`vm run -- CMD`, `vm exec` and `vm ssh` give the exit code of the command inside, and 128+n
when it died of signal n. With --json an error is {"error": {"code", "message", "hint", "op"}} on
standard output, with the same exit code.
"""
