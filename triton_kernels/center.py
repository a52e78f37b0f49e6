def center(*arguments):
    raise NotImplementedError


def center_backward(*arguments):
    raise NotImplementedError


def center_with_mean(*arguments):
    raise NotImplementedError
