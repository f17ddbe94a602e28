"""What the numbers of a sum are, in plain words: for the consent, before anything leaves, and for the report, after it.

{their}: the rows, changes, ... of whoever is spoken to or about: `your`, or `the owner's`.
"""

CONTRIBUTIONS = {
    "gram": "Gram matrices: sums over {their} rows of products of a layer's inputs",
    "gram_delta": "Gram matrices times {their} weight changes",
    "diagonal_delta": "diagonals of Gram matrices times {their} weight changes",
    "data_free_gram": "products of {their} weight changes with themselves, per layer; no row is in them",
    "data_free_gram_delta": "those products times {their} weight changes",
    "data_free_diagonal_delta": "diagonals of those products times {their} weight changes",
    "weighted_delta": "{their} weight changes times {their} weight in the mean",
    "fisher": "squared gradients, summed over {their} rows (Fisher information)",
    "fisher_delta": "squared gradients times {their} weight changes",
    "head_gram": "products of the classifier's inputs with themselves, on the merged model, summed over {their} rows",
    "head_start": "those products times the base's classifier",
    "head_targets": "the classifier's inputs times what it is fitted to, summed over {their} rows",
    "head_scores": "the size of {their} own model's scores",
    "head_rows": "the number of rows that the classifier is fitted to",
    "diagonal": "the diagonals of Gram matrices, alone and first, for the scales on which the rest is summed",
    "columns": "the size of each column of Gram matrices times {their} weight changes, for the scales",
    "largest": "the largest of {their} weight changes in each tensor, times {their} weight in the mean, for the scales",
    "rows": "the number of rows behind each Gram matrix",
    "weight": "{their} weight in the mean",
    "examples": "{their} number of training rows",
}
FIGURES = {
    "mean": "a model's accuracy and figure on {their} rows, in thousandths",
    "pooled": "the number of {their} predictions by a model, and of those that are right",
    "shown": "the same by name, of owners that agreed to it; zeros of the others",
}


def contribution_kind(name: str) -> str:
    """Which of CONTRIBUTIONS the tensor `name` of a contribution or of a later step is."""
    return name.split("/")[0].split("@")[0]


def figure_kind(name: str) -> str:
    """Which of FIGURES the tensor `name` of a sum of figures is."""
    return name.rpartition("/")[2]
