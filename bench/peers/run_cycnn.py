"""cycnn as a user gets it (each step one CUDA graph), and eager."""

import networks
import numpy as np

import cycnn
from cycnn import data, nn, optim


class Contestant:
    """One way of running cycnn.

    Parameters
    ----------
    kind : {"cycnn", "cycnn-eager"}
    precision : str
    options : argparse.Namespace
    """

    version = cycnn.__version__

    def __init__(self, kind, precision, options):
        self.precision, self.device = precision, options.device
        self.capture = False if kind == "cycnn-eager" else None
        captured = kind == "cycnn" and options.device == "cuda"
        self.how = "captured" if captured else "eager"

    def prepare(self, pool, setting, parts, epochs):
        """Nothing: a training compiles what it needs before its first epoch."""

    def train(self, setting, parts, epochs, mark=None, in_a_hurry=False):
        """Train ``epochs`` epochs: (their seconds, test accuracy, settings).

        ``mark``, if given, is called with a name as each phase ends. Also sets
        ``weights``, those that were learned.
        """
        cycnn.set_precision(self.precision)
        train, test = (data.ArrayDataset(*part, 1 / 255, -0.5) for part in parts)
        trainer = self.trainer(setting, networks.NETWORKS[setting.network])
        callbacks = []
        if mark:
            mark("model")
            callbacks = [lambda _, record: mark(f"epoch {record.epoch}")]
        history = trainer.fit(train, epochs, setting.batch, seed=0, callbacks=callbacks)
        accuracy = trainer.evaluate(test)["accuracy"]
        self.weights = [weight.data.numpy() for weight in trainer.model.parameters()]
        return history["seconds"], accuracy, f"{self.how}, Trainer.fit, uint8 images"

    def trainer(self, setting, network, weights=None):
        model = networks.build(network, nn, nn.Residual).to(self.device)
        weights = weights or networks.starting_weights(network)
        for parameter, array in zip(model.parameters(), weights, strict=True):
            parameter.data.copy_(array)
        common = {"lr": network.rate, "weight_decay": networks.DECAY}
        if network.optimizer == "sgd":
            optimizer = optim.SGD(
                model.parameters(), momentum=networks.MOMENTUM, **common
            )
        else:
            optimizer = optim.RMSprop(
                model.parameters(), alpha=networks.ALPHA, eps=networks.EPS,
                initial_accumulator=networks.ACCUMULATOR, **common,
            )
        return cycnn.Trainer(
            model, nn.NLLLoss(), optimizer, optim.schedules.linear(),
            capture=self.capture,
        )

    def predictor(self, setting, weights, images):
        """(function of a slice to the scores of those images, settings).

        Images and scores are ndarrays, float32; or, if the setting says so, both lie on
        the device, and the function waits for the scores.
        """
        cycnn.set_precision(self.precision)
        network = networks.NETWORKS[setting.network]
        # kept, which a Predictor does not do
        model = self.model = self.trainer(setting, network, weights).model
        predict = model.predict
        if self.capture is False:
            predict = nn.Predictor(model, captured=False)
        settings = f"{self.how}, model.predict"
        if not setting.resident:
            return lambda part: predict(images[part]), settings
        images = cycnn.Tensor(images, self.device)

        def score(part):
            scores = predict(images[part])
            cycnn.synchronize(self.device)
            return scores

        return score, settings

    # scores, wherever they are, as an ndarray
    array = staticmethod(np.asarray)
