"""The parts that models are composed of: modules that hold parameters, each with the equation it implements."""
