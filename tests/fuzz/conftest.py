def pytest_addoption(parser):
    parser.addoption("--fuzz-cases", type=int, help="mutated inputs of each test here; by default few, for CI")
