def test_x(built, printed):
    import time
    print(printed(built.first)); print(built.result)
