# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A tour: load a model, evaluate it, and look at what it does
#
# This notebook uses the demo set: drawn scenes of coloured shapes with captions, and a SCAN model
# that was trained on them for some minutes. Make both first, in the project's folder:
#
# ```bash
# bash scripts/demo.sh
# pip install matplotlib scipy jupyter
# ```
#
# Every step works in the same way on Flickr30K or MS-COCO, and with every model of this project;
# only the pictures need a folder of photos. The notebook is written as `docs/tour.py`; its last
# cell says how it becomes `docs/tour.ipynb`.

# %%
import os
import sys

if os.path.basename(os.getcwd()) == "docs":  # Jupyter starts a notebook in its own folder
    os.chdir("..")
sys.path.insert(0, os.getcwd())

# %%
import matplotlib.pyplot as plt
import numpy as np

import checkpoint
import evaluation
import explain
import intervals
from util import attention_figure
from util.devices import pick_device

RUN = os.environ.get("TOUR_RUN", "runs/demo")  # the folder of the checkpoints
BEST = f"{RUN}/model_best.pth.tar"
EARLIER = f"{RUN}/checkpoint_{os.environ.get('TOUR_EPOCH', '3')}.pth.tar"
DATA = os.environ.get("TOUR_DATA", "data")  # the folder that holds demo_precomp/
PICTURES = f"{DATA}/demo_precomp/pictures"

BLUE, ORANGE, GREY = "#2a78d6", "#c2560c", "#666666"
plt.rcParams["figure.dpi"] = 80
plt.rcParams["axes.spines.top"] = plt.rcParams["axes.spines.right"] = False

# %% [markdown]
# ## Evaluate
#
# `evalrank` loads a checkpoint, encodes a split, scores all pairs, and prints the table that the
# papers print. Here it does so for `dev`. It returns the same numbers as a dictionary: recalls in
# percent, and median and mean ranks that count from 1.

# %%
metrics = evaluation.evalrank(BEST, data_path=DATA, split="dev")
print()
print("The share of captions whose image comes first:", metrics["t2i"]["r1"], "%")

# %% [markdown]
# `rank_models` does the same and keeps everything: the scores, the captions, the names of the
# images, and the rank of every query. All that follows reads this `Ranking`.


# %%
def rank_test(path):
    """The Ranking of one checkpoint on the test split."""
    where = {"data_path": DATA, "split": "test", "vocab_path": None, "batch_size": None}
    where["device"] = pick_device("auto")
    return evaluation.rank_models(
        [path], fold5=False, save_path=None, published_boxes=False, **where
    )


ranking = rank_test(BEST)

# %% [markdown]
# ## How to read a score matrix
#
# The scores are a matrix with a row for each image and a column for each caption. In this set the
# captions stand image by image, five for each. So the scores of the right pairs stand on the
# diagonal, in steps of five columns. `own_image` says for any set which image a caption belongs to.

# %%
scores, own = ranking.scores, ranking.own_image
n_images, n_captions = scores.shape
print(f"{n_images} images x {n_captions} captions, {scores.dtype}")

some = slice(0, min(12, n_images))
columns = np.flatnonzero(own < some.stop)
figure, axes = plt.subplots(figsize=(9, 3), layout="constrained")
shown = axes.imshow(scores[some][:, columns], aspect="auto", cmap="Blues")
for k, caption in enumerate(columns):
    axes.add_patch(plt.Rectangle((k - 0.5, own[caption] - 0.5), 1, 1, fill=False, ec=ORANGE))
axes.set(xlabel="caption", ylabel="image", title="Scores; the right pairs have a frame")
figure.colorbar(shown, label="score")
plt.show()

# %% [markdown]
# A model retrieves well if the darkest cell of a column is the one with a frame (text to image),
# and the darkest cell of a row is one of the five with a frame (image to text). Where two images
# look alike here, the second scene is a twin of the first, with two colours or two places
# exchanged: these are hard to tell apart.
#
# `ranks` holds the rank of every query, from 0: of a caption it is the number of images that score
# more than its own. Recall at K is the share of the queries whose rank is below K.

# %%
ranks = ranking.ranks
caption = int(ranks.t2i.argmax())
column = scores[:, caption]
print(f"caption {caption}: {ranking.captions[caption]}")
print(f"its own image scores {column[own[caption]]:.3f}")
print(f"images that score more: {(column > column[own[caption]]).sum()}")
print(f"its rank, from 0: {ranks.t2i[caption]}")
for k in (1, 5, 10):
    recalls = [100 * (rank < k).mean() for rank in (ranks.i2t, ranks.t2i)]
    print(f"R@{k}: image to text {recalls[0]:.1f}, text to image {recalls[1]:.1f}")

# %% [markdown]
# ## Recall at every K
#
# The papers print R@1, R@5 and R@10. The whole curve shows how far down the right answers are.
# The dotted line is chance, text to image: a model that knows nothing.

# %%
most = min(100, n_images)
ks = np.arange(1, most + 1)
figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
for name, rank_of, colour in (
    ("image to text", ranks.i2t, BLUE),
    ("text to image", ranks.t2i, ORANGE),
):
    axes.plot(ks, [100 * (rank_of < k).mean() for k in ks], color=colour, label=name)
axes.plot(ks, 100 * ks / n_images, color=GREY, linestyle=":", label="chance")
axes.set(xscale="log", xlabel="K", ylabel="R@K in percent", ylim=(0, 103), title="Recall at K")
axes.set_xticks([1, 2, 5, 10, 20, 50, 100], [1, 2, 5, 10, 20, 50, 100])
axes.set_xlim(1, most)
axes.legend()
plt.show()

# %% [markdown]
# ## Where the ranks lie
#
# A histogram of the ranks. Most queries are found at once. The tail to the right raises the mean
# rank, but not the median rank.

# %%
limits = np.array([1, 2, 3, 4, 6, 11, 21, 51, 101, 10**9])
names = [str(a) if b == a + 1 else f"{a}-{b - 1}" for a, b in zip(limits, limits[1:], strict=False)]
names[-1] = f"> {limits[-2] - 1}"
figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
for name, rank_of, colour, left in (
    ("image to text", ranks.i2t, BLUE, -0.2),
    ("text to image", ranks.t2i, ORANGE, 0.2),
):
    counts = np.histogram(rank_of + 1, limits)[0]
    places = np.arange(len(counts)) + left
    axes.bar(places, 100 * counts / len(rank_of), 0.4, color=colour, label=name)
axes.set_xticks(range(len(names)), names)
axes.set(xlabel="rank of the right answer, from 1", ylabel="percent of the queries")
axes.legend()
plt.show()

# %% [markdown]
# ## How sure are these numbers?
#
# With other test images the recalls would be a little different. `recall_intervals` draws images,
# each with all of its captions, again and again, and makes of the recalls that come out an interval
# of 95 %. If a recall of another paper lies within it, do not call yours better or worse.

# %%
sure = intervals.recall_intervals(ranks)
print("              recall   95 % interval")
for way in ("i2t", "t2i"):
    for name in ("r1", "r5", "r10"):
        low, high = sure[way][name]
        print(
            f"{way} R@{name[1:]:>2}     {ranking.metrics[way][name]:6.1f}   {low:.1f} to {high:.1f}"
        )

# %% [markdown]
# ## The worst queries
#
# Numbers do not say why a query fails. Here are the captions whose own image has the worst rank:
# to the left their image, to the right the one that came first instead.


# %%
def picture(image):
    """The picture (H, W, 3) of an image of the test split."""
    return plt.imread(f"{PICTURES}/test/{ranking.ids[image]}.png")


worst = np.argsort(-ranks.t2i, kind="stable")[:3]
figure, panels = plt.subplots(len(worst), 2, figsize=(6.4, 9), layout="constrained")
for caption, (left, right) in zip(worst.tolist(), panels, strict=True):
    first = ranks.first_image[caption]
    left.imshow(picture(own[caption]))
    right.imshow(picture(first))
    text = ranking.captions[caption]
    left.set_title(f"{text}\nrank {ranks.t2i[caption] + 1}", loc="left", fontsize=9)
    right.set_title("came first", loc="left", fontsize=9)
    for panel, image in ((left, own[caption]), (right, first)):
        panel.set_xlabel(f"score {scores[image, caption]:.3f}", fontsize=9)
        panel.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## What the model looks at
#
# `explain_pair` scores one pair and keeps what the score is made of. `t2i` has a row for each word:
# how much weight each region has for it. `util/attention_figure.py` draws it on the picture. (On
# the command line, `util/visualize.py` does the same.)

# %%
model, vocab, options = checkpoint.load_model(BEST)
dataset = ranking.splits[0].dataset
found = np.flatnonzero(ranks.t2i == 0)  # captions whose image comes first
caption = int(found[0]) if len(found) else 0
explanation = explain.explain_pair(model, dataset, caption, vocab)
print(f"caption {caption}: {explanation.caption}")
print(f"score {explanation.score:.4f}; in the matrix {scores[own[caption], caption]:.4f}")

boxes, size = explain.region_boxes(dataset, own[caption])
attention_figure.draw(explanation, boxes, size, picture(own[caption]))  # a Figure: shown below

# %% [markdown]
# The weights are an ordinary tensor (words, regions). A word that looks everywhere has low weights
# only; a word that names something should look at it.

# %%
for word, weights in zip(explanation.tokens, explanation.t2i, strict=True):
    largest = int(weights.argmax())
    print(f"{word:>12}  looks most at region {largest:>2}, weight {weights[largest]:.2f}")

# %% [markdown]
# ## Is one model better than another?
#
# An earlier epoch of the same training, on the same queries. What counts is not the two recalls
# alone but the queries on which the two differ. `paired_test` counts them, gives the difference
# with its interval, and a p value: how often a difference like this comes about by chance.

# %%
earlier = rank_test(EARLIER)
test = intervals.paired_test(earlier.ranks, ranks)
for way, result in test.items():
    low, high = result["interval"]
    print(
        f"{way}: {result['difference']:+.1f} points of R@1 ({low:+.1f} to {high:+.1f}), "
        f"p = {result['p']:.3g}; only the earlier model finds {result['only_a']}, "
        f"only the best {result['only_b']}"
    )

# %% [markdown]
# ## Go on
#
# - `python evaluation.py CHECKPOINT --report report.html` writes all this for any model as one page
#   ([report](report.md)). How the intervals and the test are made: [statistics](statistics.md).
# - [models](models.md) has the variants that can be trained, [data](data.md) how to bring your own
#   images, and [adding a model](adding_a_model.md) how to write a new one.
#
# This notebook is kept as a script, `docs/tour.py`, so that changes can be read and a test can run
# it. After a change of the script, in the project's folder:
#
# ```bash
# pip install jupytext nbconvert ipykernel
# jupytext --update --to ipynb docs/tour.py
# jupyter nbconvert --execute --inplace --ExecutePreprocessor.record_timing=False docs/tour.ipynb
# ```
