"""One launch for a whole training step on CUDA: capture it once, replay it."""

import torch

_WARM_UP_CALLS = 3


class StepGraph:
    """Runs ``function()`` again and again; on CUDA as one captured graph after the first calls.

    The function takes its inputs from, and leaves its results in, tensors that stay where they are, and never waits
    for the device. The calls before the capture are real ones: they warm up libraries and the allocator.

    Args:
        function: takes and returns nothing.
        device: where it works; off CUDA every call is a plain call.
    """

    def __init__(self, function, device):
        self._function, self._device = function, torch.device(device)
        self._calls, self._graph = 0, None

    def __call__(self):
        if self._device.type != "cuda":
            self._function()
        elif self._graph is not None:
            self._graph.replay()
        elif self._calls < _WARM_UP_CALLS:
            self._calls += 1
            self._warm_up()
        else:
            with torch.cuda.device(self._device):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    self._function()
            # capturing runs nothing
            graph.replay()
            self._graph = graph

    def _warm_up(self):
        # autograd remembers the streams it ran on: none of them may be the default one, which cannot be captured
        with torch.cuda.device(self._device):
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                self._function()
            current.wait_stream(side)
