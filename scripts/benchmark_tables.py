"""The figures of scripts/benchmark.py as tables and as a picture."""

ROWS = [
    ("scoring, ours / usual loop", "score_speedup", "{:.1f} x faster"),
    ("scoring, ours / bare matrix product", "score_vs_gemm", "{:.2f}"),
    ("training step, ours / usual loop", "step_speedup", "{:.1f} x faster"),
    ("training step, ours / floor", "step_vs_floor", "{:.2f}"),
    ("peak memory of a step, usual loop / ours", "step_memory_ratio", "{:.1f} x less"),
    ("step with --grad_checkpointing / floor", "step_parts_vs_floor", "{:.2f}"),
    ("its peak memory, usual loop / ours", "step_parts_memory_ratio", "{:.1f} x less"),
    ("evalrank, ours / published procedure", "evalrank_speedup", "{:.1f} x faster"),
]


def print_tables(result: dict, parts_of_batch: int) -> None:
    """The figures, for people."""
    here = result["machine"]
    print(
        f"{here['cpu']}, {here['cores']} cores, {here['threads']} threads, "
        f"{here['memory_gib']} GiB; GPU: {here['gpu']}; torch {here['torch']}"
    )
    print(f"size: {result['size']}; --grad_checkpointing {parts_of_batch} where it says so\n")
    ways = result["ways"]
    print(f"| | {' | '.join(ways)} |\n|---|{'---|' * len(ways)}")
    for title, key, form in ROWS:
        if not any(key in result[w] for w in ways):
            continue
        cells = [form.format(result[w][key]) if key in result[w] else "-" for w in ways]
        print(f"| {title} | {' | '.join(cells)} |")
    print(f"\n| seconds (median), MiB (peak) | {' | '.join(ways)} |\n|---|{'---|' * len(ways)}")
    for key in result[ways[0]]:
        if key.endswith(("_s", "_mib")):
            print(f"| {key} | {' | '.join(f'{result[w][key]:.4g}' for w in ways)} |")
    if "growth" in result[ways[0]]:
        print("\n| images x captions | t2i s | MiB | i2t s | MiB |\n|---|---|---|---|---|")
        for rows in zip(*(result[w]["growth"] for w in ways), strict=True):
            cells = [f"{x:.4g}" for row in rows for x in (row["seconds"], row["mib"])]
            print(f"| {rows[0]['images']} x {rows[0]['captions']} | {' | '.join(cells)} |")


def plot(result: dict, path: str, growth_captions: int) -> None:
    """Times beside each other, and the growth with the number of images."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    bars = [
        ("score_gemm_s", "bare product"),
        ("score_ours_s", "scoring"),
        ("score_loop_s", "usual loop"),
        ("step_encoders_s", "encoders"),
        ("step_ours_s", "step"),
        ("step_loop_s", "step, usual loop"),
    ]
    ways = result["ways"]
    bars = [(key, name) for key, name in bars if key in result[ways[0]]]
    for at, way in enumerate(ways):
        shift = 0.4 * (at - (len(ways) - 1) / 2)
        heights = [result[way][key] for key, _ in bars]
        left.bar([k + shift for k in range(len(bars))], heights, 0.4, label=way)
        rows = result[way].get("growth", [])
        right.plot([r["images"] for r in rows], [r["seconds"] for r in rows], "o-", label=way)
    left.set_xticks(range(len(bars)), [name for _, name in bars], rotation=20)
    left.set(yscale="log", ylabel="seconds", title=f"batch {result['size']['batch']}")
    right.set(xlabel="images", ylabel="seconds", title=f"scoring with {growth_captions} captions")
    for axes in (left, right):
        axes.legend()
    figure.tight_layout()
    figure.savefig(path)
