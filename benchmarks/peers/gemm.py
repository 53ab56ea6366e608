"""Not a contestant but the machine: the rate of its matrix products at the model's own shapes, taken in turn with the
contestants. Each frozen layer's product with a whole step's rows, forward and for the gradient of its input; where it
has no arithmetic for 16 bits, in float32."""

import time

from protocol import DTYPES, Worker

worker = Worker()

import torch  # noqa: E402

from lit_gpt.kernels.linear import arithmetic  # noqa: E402


def seconds(product) -> float:
    start = time.perf_counter()
    product()
    if worker.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def main() -> None:
    products = []
    new = {"dtype": arithmetic(worker.device, DTYPES[worker.job["precision"]]), "device": worker.device}
    for rows, k, n, count in worker.job["shapes"]:
        x, weight, gradient = (torch.randn(shape, **new) for shape in ((rows, k), (n, k), (rows, n)))
        products.append((lambda x=x, weight=weight: x @ weight.T, rows * k * n * count, count))
        products.append((lambda g=gradient, weight=weight: g @ weight, rows * k * n * count, count))
    for _ in worker.steps():
        spent = sum(count * seconds(product) for product, _, count in products)
        flops = 2 * sum(size for _, size, _ in products)
        worker.result(flops / spent, 0)


main()
