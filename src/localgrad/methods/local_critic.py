"""Local critic training."""

from __future__ import annotations

from localgrad import heads
from localgrad.method import HeadBuilder, Method, Task, Term
from localgrad.spans import Local


def local_critic(task: Task, *, head: heads.Spec | HeadBuilder | None = None) -> Method:
    """Every block minimises what its critic says the loss will be; critics learn to say what the next one says.

    ``block k: task.loss(c_k(h_k))``, ``c_k: | task.loss(c_k(stop_gradient(h_k))) - stop_gradient(L_{k+1}) |``, where
    ``L_K`` is the model's own loss.

    Args:
        task: from `localgrad.tasks`.
        head: the critic; default `localgrad.heads.Critic`. It runs twice a step: choose one without BatchNorm.

    Example:
        >>> import localgrad
        >>> localgrad.methods.local_critic(localgrad.tasks.classification(10)).name
        'local_critic'

    Source: Lee et al., Local Critic Training, arXiv:2102.01963.
    Differs: critics share the blocks' optimizer (theirs: Adam, 1e-4); the distance is that of the batch's mean losses.
    """
    critic = task.head(heads.Critic(task.num_outputs)) if head is None else heads.named(head, task)
    return Method("local_critic", task, terms=(Term(critic, task.loss, follows=True),), spans=Local())
