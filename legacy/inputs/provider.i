# Elasticity whose Young's modulus is the output of another block, ahead of a scalar that relaxes towards the pressure.
# With that block's value promoted, the parameter reaches the forward segment before the strain does: neml2 3.0.0 and
# 3.0.3 then put it first in the graph. (They cannot promote inside a composed model without an implicit update.)

[Models]
  [young]
    type = ScalarConstantParameter
    value = '190.0'
  []
  [hooke]
    type = LinearIsotropicElasticity
    strain = 'strain'
    stress = 'stress'
    coefficient_types = 'YOUNGS_MODULUS POISSONS_RATIO'
    coefficients = 'young 0.29'
  []
  [pressure]
    type = SR2Invariant
    tensor = 'stress'
    invariant = 'pressure'
    invariant_type = 'I1'
  []
  [relax]
    type = ScalarLinearCombination
    from = 'pressure x'
    weights = '0.5 -0.8'
    to = 'x_rate'
  []
  [step]
    type = ScalarBackwardEulerTimeIntegration
    variable = 'x'
  []
  [residual]
    type = ComposedModel
    models = 'relax step'
  []
  [follow]
    type = ImplicitUpdate
    equation_system = 'balance'
    solver = 'newton'
  []
  [gauge]
    type = ComposedModel
    models = 'hooke pressure follow'
    additional_outputs = 'stress x'
  []
[]

[EquationSystems]
  [balance]
    type = NonlinearSystem
    model = 'residual'
    unknowns = 'x'
  []
[]

[Solvers]
  [lu]
    type = DenseLU
  []
  [newton]
    type = Newton
    linear_solver = 'lu'
    abs_tol = 1e-13
    rel_tol = 1e-13
  []
[]
