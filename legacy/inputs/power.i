# A flow rate that is a power of the overstress. From 3.0.6 on its graph calls neml2's own power operator by name,
# which whoever loads the graph must have defined; before, the operator was decomposed away.

[Models]
  [flow]
    type = PerzynaPlasticFlowRate
    yield_function = 'overstress'
    flow_rate = 'rate'
    reference_stress = '80.0'
    exponent = '3.5'
  []
[]
