"""Facts as lines of text, for a terminal."""

import json
from typing import Any


def ledger_lines(facts: dict[str, Any]) -> list[str]:
    """What a ledger holds and how well it closes."""
    maxima, asked = facts["maxima"], facts["settings"]
    return [
        f"ledger {facts['ledger']}: {' × '.join(f'{n} {axis}' for axis, n in facts['axes'].items())}",
        f"  rule        {asked['rule']}{_recipes(facts['recipes'])}; {asked['dtype']}, {asked['device']}; view {asked['view']}",
        f"  path        {maxima['path']:.3g} at most, {100 * maxima['path_share']:.2g} % of the movement of its measure",
        f"  arithmetic  {maxima['arithmetic']:.3g} at most, {100 * maxima['arithmetic_share']:.2g} % of the movement of its measure",
        f"  replay      an update was off by {maxima['replay_error']:.2g} of its size at most",
        f"  closure     {maxima['closure']:.2g} at most",
        f"  explained   {facts['explained_min']:.6f} at least",
        *(f"  note        {asked[name]}" for name in ("rule_note", "relived") if asked.get(name)),
        *_judged(facts),
    ]


def _recipes(counts: dict[str, int]) -> str:
    """What the rule did, the most frequent first; nothing where its name says all."""
    whole = sum(counts.values())
    some = [f"{name} on {100 * count / whole:.0f} % of the steps" for name, count in list(counts.items())[:3]]
    return "" if len(counts) == 1 and not whole else f" ({', '.join(some)}{', …' if len(counts) > 3 else ''})"


def _judged(facts: dict[str, Any]) -> list[str]:
    return ["  ok"] if facts["ok"] else [f"  FAILED: {reason}" for reason in facts["reasons"]]


def shard_lines(facts: dict[str, Any]) -> list[str]:
    """What is left to do when a shard is done."""
    index, of = facts["shard"].split("/")
    left = ", ".join(map(str, facts["left"])) or "another one is just assembling the ledger"
    return [f"shard {index} of {of} done; {len(facts['left'])} left: {left}"]


def verify_lines(facts: dict[str, Any]) -> list[str]:
    """What ``verify`` found of a run and its ledgers."""
    state = "complete" if facts["complete"] else "the recording was cut off; these steps are whole"
    lines = [f"run {facts['run']}: {facts['steps']} steps, {state}"]
    if facts["replay_error"] is None:
        lines.append("  replay      not checked: nothing could be replayed, or the run names no task")
    else:
        lines.append(f"  replay      an update was off by {facts['replay_error']:.2g} of its size at most")
    lines += [f"  note        {note}" for note in facts["notes"]]
    lines += ["  ok"] if not facts["reasons"] else [f"  FAILED: {reason}" for reason in facts["reasons"]]
    return lines + [line for entry in facts["ledgers"] for line in ledger_lines(entry)]


def analysis_lines(facts: dict[str, Any]) -> list[str]:
    """Where the tables of a run and its ledgers are, and what did not fit."""
    lines = []
    for name, entry in facts.items():
        lines.append(f"analyses of {name}:")
        lines += [f"  {file}" for file in entry["files"]]
        lines += [f"  left out    {what}" for what in entry["left_out"]]
    return lines


def transplant_lines(facts: dict[str, Any]) -> list[str]:
    """What a transplant can do, or what became of it in training."""
    lines = [f"{', '.join(facts['layers'])} from {facts['from']} into {facts['into']}"]
    for name, found in facts.get("evaluated", {}).items():
        lines.append(
            f"  {name:<11} validation accuracy {found['val_accuracy']:.3f}, loss {found['val_loss']:.4g}; training accuracy "
            f"{found['train_accuracy']:.3f}, loss {found['train_loss']:.4g}; KL from the host {found['kl_from_host']:.3g} nats"
        )
    for found in facts.get("trained", ()):
        when = f"reached {found['stop']} after {found['steps']} steps" if found["steps"] is not None else f"not {found['stop']}"
        lines.append(f"  seed {found['seed']}: validation {when}; {found['val_accuracy']:.3f} after {found['taken']}; {found['recorded']}")
    return lines


def pruning_lines(facts: dict[str, Any]) -> list[str]:
    """What is left of a network at each share of its parameters."""
    lines = [f"{'method':<10} {'level':<7} {'kept':>6} {'accuracy':>9} {'loss':>9} {'KL, nats':>9}   on validation"]
    for row in facts["rows"]:
        numbers = f"{row['kept']:>6g} {row['val_accuracy']:>9.3f} {row['val_loss']:>9.4g} {row['kl']:>9.3g}"
        lines.append(f"{row['method']:<10} {row['level']:<7} {numbers}")
    lines.append(f"kept whole: {', '.join(facts['spared']) or 'nothing'}; {facts['table']}")
    return lines + (_ranked_lines(facts) if "ablation" in facts else [])


def _ranked_lines(facts: dict[str, Any]) -> list[str]:
    """How well each score foretells what a component's removal costs."""
    lines = [
        "",
        "every component taken out alone: rank correlation (Spearman) of its score with what that costs on validation",
        f"{'method':<10} {'level':<7} {'components':>10} {'loss':>9} {'accuracy':>9} {'KL':>9}",
    ]
    for row in facts["ablation_ranks"]["rows"]:
        cells = ("–" if row[name] is None else f"{row[name]:.3f}" for name in ("loss", "accuracy", "kl"))
        lines.append(f"{row['method']:<10} {row['level']:<7} {row['components']:>10} {' '.join(f'{cell:>9}' for cell in cells)}")
    return [*lines, f"{facts['ablation']['table']}; {facts['ablation_ranks']['table']}"]


def info_lines(facts: dict[str, Any]) -> list[str]:
    """What a run is."""
    config, damaged = facts["config"] or {}, facts["sound"] < facts["steps"]
    counted = f" recorded, {facts['sound']} of them sound; examples and gradients are counted in these" if damaged else ""
    lines = [
        f"run {facts['path']}: {facts['steps']} steps{counted}" + ("" if facts["complete"] else " (cut off)"),
        f"  model       {facts['model']}, {facts['parameters']} parameters in {len(facts['layers'])} layers",
        f"  optimizer   {facts['optimizer']}, {facts['reduction']} loss, {facts['examples']} examples, seed {facts['seed']}",
        f"  made with   {', '.join(f'{name} {version}' for name, version in facts['versions'].items())} on {facts['device']}",
    ]
    if facts["thin"]:
        lines.append(f"  thin        parameters and optimizer state every {facts['thin']} steps; what is between is lived again")
    if facts["gradients"]:
        of = facts["gradients"]
        lines.append(f"  gradients   {of['count']} of single examples, {of['dtype']}, {of['bytes'] / 2**20:.1f} MiB before compression")
    if damaged:
        of = f"{facts['sound']} steps are sound of the {facts['steps']} recorded"
        lines.append(f"  DAMAGED     {of}: explaind verify says what is not, explaind repair cuts the rest off")
    lines += [f"  DAMAGED     {facts[what]}" for what in ("constants_damage", "log_damage") if facts[what]]
    if facts["changed"]:
        lines.append(f"  CHANGED     {', '.join(facts['changed'])}: not what was recorded")
    if facts["logged"] and not facts["log_damage"]:
        lines.append(f"  log         {facts['logged']} more steps: explaind repair takes them up")
    lines += [f"  task        {json.dumps(config['task'])}"] if "task" in config else []
    return lines + [f"  ledger      {path}" for path in facts["ledgers"]]


def report_lines(entry: dict[str, Any]) -> list[str]:
    """What a report wrote."""
    lines = [f"report on {entry['ledger'] if 'ledger' in entry else entry['tables']}"]
    if entry["training"] is not None:
        known, grasped, end = entry["training"]["train_0.99_at"], entry["training"]["val_0.95_at"], entry["training"]["final_accuracy"]
        lines.append(
            f"  training    accuracy {end['train']:.3f}, validation {end['val']:.3f} at the end"
            + ("" if known is None else f"; training reached 0.99 at step {known}")
            + ("" if grasped is None else f", validation 0.95 at step {grasped}")
        )
    return [*lines, *(f"  left out    {words}" for words in entry["left_out"]), *(f"  {path}" for path in entry["files"])]


def run_lines(facts: dict[str, Any]) -> list[str]:
    """What a whole run came to."""
    judged = [f"run {facts['run']} holds: its bytes, its replay and its ledger" if facts["ok"] else "the run or its ledger does not hold"]
    reasons = [f"  FAILED: {reason}" for reason in facts["reasons"]]
    drawn = [line for entry in facts["tables"] for line in report_lines(entry)]
    return [*drawn, *report_lines(facts), *ledger_lines({**facts["facts"], "ledger": facts["ledger"]}), *judged, *reasons]


def doctor_lines(facts: dict[str, Any]) -> list[str]:
    """What the doctor found."""
    lines = [f"{facts['of']}: {'can be explained' if facts['ok'] else 'cannot be explained as it is'}"]
    lines += [f"  REFUSED: {reason}" for reason in facts["refused"]]
    lines += [f"  optimizer   {words}" for words in facts["optimizers"]]
    lines += [f"  measure     {facts['measure']} (of {', '.join(facts['measures'])})"]
    ways: dict[str, list[str]] = {}
    for layer, way in facts["layers"].items():
        ways.setdefault(way, []).append(layer)
    lines += [f"  products    {way}: {', '.join(layers)}" for way, layers in ways.items()]
    lines += [f"  buffers     {', '.join(facts['buffers'])} move, and have a row of their own"] if facts["buffers"] else []
    lines += ["  random      numbers were drawn in forward passes; they are replayed"] if facts["random"] else []
    if facts["replay_error"] is not None:
        lines.append(f"  replay      updates rebuilt to {facts['replay_error']:.2g} of their size")
    if facts["explained"] is not None:
        lines.append(f"  trial       explained at least {facts['explained']:.6f}")
    lines += [f"  warning     {words}" for words in facts["warnings"]]
    lines += [_needs(facts)] if facts["seconds"] is not None else []
    if facts["recommended"]:
        lines.append("  recommended " + ", ".join(f"{name} = {value!r}" for name, value in facts["recommended"].items()))
    return lines


def _needs(facts: dict[str, Any]) -> str:
    """Time, memory and disk of all steps."""
    record = "" if facts.get("record_seconds") is None else f"recording {facts['record_seconds']:.3g} s, "
    memory, disk = (facts[name] / (1 << 30) for name in ("memory", "disk"))
    return f"  {facts['steps']} steps  {record}decomposing {facts['seconds']:.3g} s, memory {memory:.2f} GiB, disk {disk:.3f} GiB"


def plan_lines(facts: dict[str, Any]) -> list[str]:
    """What every way to record takes, as a table."""
    amounts = " ".join(f"{name:>9}" for name in ("disk", "record", "memory", "ledger"))
    head = f"{'thickness':<17} {'codec':<9} {'gradients':<10} {amounts} {'decompose':>10} {'memory':>9}"
    lines = [f"{facts['of']}: {facts['steps']} steps, estimated from a few", *(f"  REFUSED: {reason}" for reason in facts["refused"])]
    lines.append(f"  {head}")
    for way in facts["choices"]:
        name = f"every {way['thin']} steps" if way["thin"] else "every step"
        first = f"  {name + (' *' if way['asked'] else ''):<17} {way['codec']:<9} {way['gradients'] or '–':<10}"
        if way["refused"]:
            lines.append(f"{first} refused: {way['refused']}")
            continue
        record = f"{_amount(way['disk'])} {_clock(way['record_seconds'])} {_amount(way['record_memory'])}"
        lines.append(f"{first} {record} {_amount(way['ledger'])} {_clock(way['decompose_seconds']):>10} {_amount(way['decompose_memory'])}")
    lines.append("  * as the configuration says; thin records live the steps between again; the ledger is uncompressed")
    return [*lines, "  gradients of examples are made again for a decomposition, or stored in that dtype"]


def _amount(size: float | None) -> str:
    return f"{'–':>9}" if size is None else f"{size / 2**20:.1f} MiB".rjust(9) if size < 2**30 else f"{size / 2**30:.2f} GiB".rjust(9)


def _clock(seconds: float | None) -> str:
    return f"{'–':>9}" if seconds is None else f"{seconds:.3g} s".rjust(9) if seconds < 7200 else f"{seconds / 3600:.1f} h".rjust(9)


def repair_lines(facts: dict[str, Any]) -> list[str]:
    """What a repair did."""
    done = [f"{facts[name]} {words}" for name, words in (("regained", "taken from its log"), ("lost", "cut off")) if facts[name]]
    done += [f"{', '.join(facts['restored'])} put back"] if facts["restored"] else []
    rest = [f"  DAMAGED     {facts['left']}: restore them from a copy"] if facts["left"] else []
    return [f"run {facts['run']}: {facts['after']} steps" + (f" ({', '.join(done)})" if done else ", nothing to repair"), *rest]


def upgrade_lines(facts: dict[str, Any]) -> list[str]:
    """What an upgrade did."""
    before, after = facts["before"], facts["after"]
    done = f"schema {before} → {after}" if before != after else f"schema {after} already"
    return [f"run {facts['run']}: {done}, {facts['steps']} steps"]


def export_lines(facts: dict[str, Any]) -> list[str]:
    """What went into a file."""
    return [f"exported {facts['run']} to {facts['file']}: {_exchanged(facts)}"]


def import_lines(facts: dict[str, Any]) -> list[str]:
    """What came out of a file."""
    return [f"imported {facts['file']} to {facts['run']}: {_exchanged(facts)}"]


def _exchanged(facts: dict[str, Any]) -> str:
    steps = f"{facts['steps']} steps{'' if facts['complete'] else ' (cut off)'}"
    ledgers = f"{len(facts['ledgers'])} ledger{'' if len(facts['ledgers']) == 1 else 's'}"
    return f"{steps}, {ledgers}, {facts['bytes'] / 2**20:.1f} MiB"
