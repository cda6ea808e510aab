"""``@task.ray_train``: a training loop written in the Dag file."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.sdk.bases.decorator import DecoratedOperator, task_decorator_factory

from airflow_mlops import storage
from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.operators.ray import RayTrainOperator
from airflow_mlops.shell import permanent_errors_fail
from airflow_mlops.training.spec import PICKLED, TrainingSpec

if TYPE_CHECKING:
    from airflow.sdk import Context
    from airflow.sdk.bases.decorator import TaskDecorator


class RayTrainDecoratedOperator(DecoratedOperator, RayTrainOperator):
    """Runs the decorated function as the training loop of every Ray Train worker.

    The function takes one argument, the loop's config, or none; in the Dag it is called with it: ``loop({"lr": 0.1})``.
    It travels by value, pickled into the run directory together with what it uses of the Dag file, so the workers need
    no Dag folder; the modules it imports must be installed there, and Python must be of the same minor version.

    :param python_callable: the function
    :param op_args: its positional argument, the config (templated)
    :param op_kwargs: or ``{"config": {...}}`` (templated)
    """

    template_fields: Sequence[str] = tuple(
        dict.fromkeys((*DecoratedOperator.template_fields, *RayTrainOperator.template_fields))
    )
    template_fields_renderers: ClassVar[dict[str, str]] = {
        **DecoratedOperator.template_fields_renderers,
        **RayTrainOperator.template_fields_renderers,
    }
    custom_operator_name = "@task.ray_train"

    def __init__(
        self,
        *,
        python_callable: Callable[..., Any],
        op_args: Collection[Any] | None = None,
        op_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            python_callable=python_callable,
            op_args=op_args,
            op_kwargs=op_kwargs,
            train_fn=f"{PICKLED}{python_callable.__name__}",
            **kwargs,
        )

    def execute(self, context: Context) -> dict[str, Any]:
        """Train with the decorated function, see :class:`RayTrainOperator`."""
        with permanent_errors_fail():
            self.config = self._called_with()
        return RayTrainOperator.execute(self, context)

    def _called_with(self) -> Mapping[str, Any]:
        bound = inspect.signature(self.python_callable).bind(*self.op_args, **self.op_kwargs)
        values = list(bound.arguments.values())
        if not values:
            return {}
        if len(values) > 1 or not isinstance(values[0], Mapping):
            raise InvalidInputError(
                f"{self.python_callable.__name__} is a Ray Train loop and takes one argument, a dict of JSON values "
                f"called config; it is called with {len(values)} argument(s), the first a {type(values[0]).__name__}"
            )
        return values[0]

    def _reference(self, spec: TrainingSpec) -> TrainingSpec:
        function = self.python_callable
        try:
            version = hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:12]
        except OSError:
            version = "unknown"
        name = f"{function.__qualname__}@{version}"
        return replace(spec, train_fn=f"{PICKLED}{spec.file('train_fn.pkl')}", name=name)

    def _ship(self, spec: TrainingSpec) -> None:
        import cloudpickle

        # By reference the function could only be loaded where the Dag file is importable.
        module = sys.modules.get(self.python_callable.__module__)
        if module is None:
            content = cloudpickle.dumps(self.python_callable)
        else:
            cloudpickle.register_pickle_by_value(module)
            try:
                content = cloudpickle.dumps(self.python_callable)
            finally:
                cloudpickle.unregister_pickle_by_value(module)
        storage.write_bytes(spec.file("train_fn.pkl"), content)


def ray_train_task(python_callable: Callable[..., Any] | None = None, **kwargs: Any) -> TaskDecorator:
    """Make a training task of a Ray Train loop: ``@task.ray_train(mode="local", trainer="torch", storage_path=...)``.

    :param python_callable: the loop
    :param kwargs: of :class:`RayTrainOperator`, without ``train_fn`` and ``config``
    """
    return task_decorator_factory(
        python_callable=python_callable, decorated_operator_class=RayTrainDecoratedOperator, **kwargs
    )
