def conv_center(*arguments):
    raise NotImplementedError


def conv_center_backward(*arguments):
    raise NotImplementedError
