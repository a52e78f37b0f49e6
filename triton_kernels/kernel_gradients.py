def finish_weight_grad_(*arguments):
    raise NotImplementedError


def project_kernel_gradients_(*arguments):
    raise NotImplementedError
