# A porous metal that creeps: the yield function of Gurson, Tvergaard and Needleman, whose voids grow and soften it.
# Stress in MPa, time in s.
#
# Unknowns: stress (6), equivalent_plastic_strain (1) and void_fraction (1).

[Tensors]
  # Two material points: pulled sideways held, so that the voids grow, and sheared.
  [times]
    type = Python
    expr = 'Scalar(torch.linspace(0.0, 40.0, 41, dtype=torch.float64))'
  []
  [strains]
    type = Python
    expr = 'SR2(torch.linspace(0.0, 1.6e-2, 41, dtype=torch.float64).reshape(-1, 1, 1) * torch.tensor([[1.0, -0.2, -0.2, 0.0, 0.0, 0.0], [0.1, 0.1, 0.0, 0.0, 0.8, 0.5]], dtype=torch.float64))'
  []
  [voids]
    type = Python
    expr = 'Scalar(torch.tensor([0.02, 0.005], dtype=torch.float64))'
  []
[]

[Drivers]
  [driver]
    type = TransientDriver
    model = 'porous'
    prescribed_time = 'times'
    prescribed_SR2_names = 'strain'
    prescribed_SR2_values = 'strains'
    ic_Scalar_names = 'void_fraction'
    ic_Scalar_values = 'voids'
  []
[]

[Models]
  [total_rate]
    type = SR2VariableRate
    variable = 'strain'
  []
  [mises]
    type = SR2Invariant
    invariant_type = VONMISES
    tensor = 'stress'
    invariant = 'flow_invariant'
  []
  [trace]
    type = SR2Invariant
    invariant_type = I1
    tensor = 'stress'
    invariant = 'poro_invariant'
  []
  [hardening]
    type = LinearIsotropicHardening
    equivalent_plastic_strain = 'equivalent_plastic_strain'
    isotropic_hardening = 'isotropic_hardening'
    hardening_modulus = 900
  []
  [gtn]
    type = GTNYieldFunction
    flow_invariant = 'flow_invariant'
    poro_invariant = 'poro_invariant'
    void_fraction = 'void_fraction'
    isotropic_hardening = 'isotropic_hardening'
    yield_function = 'yield_function'
    yield_stress = 150
    q1 = 1.4
    q2 = 0.9
    q3 = 1.8
  []
  [surface]
    type = ComposedModel
    models = 'mises trace gtn'
  []
  [direction]
    type = Normality
    model = 'surface'
    function = 'yield_function'
    from = 'stress isotropic_hardening'
    to = 'flow_direction hardening_direction'
  []
  [viscosity]
    type = PerzynaPlasticFlowRate
    yield_function = 'yield_function'
    flow_rate = 'flow_rate'
    reference_stress = 6
    exponent = 3
  []
  [plastic_rate]
    type = AssociativePlasticFlow
    flow_rate = 'flow_rate'
    flow_direction = 'flow_direction'
    plastic_strain_rate = 'plastic_strain_rate'
  []
  [hardening_rate]
    type = AssociativeIsotropicPlasticHardening
    flow_rate = 'flow_rate'
    isotropic_hardening_direction = 'hardening_direction'
    equivalent_plastic_strain_rate = 'equivalent_plastic_strain_rate'
  []
  [growth]
    type = GursonCavitation
    plastic_strain_rate = 'plastic_strain_rate'
    void_fraction = 'void_fraction'
    void_fraction_rate = 'void_fraction_rate'
  []
  [elastic_rate]
    type = SR2LinearCombination
    from = 'strain_rate plastic_strain_rate'
    to = 'elastic_strain_rate'
    weights = '1 -1'
  []
  [hooke]
    type = LinearIsotropicElasticity
    strain = 'elastic_strain'
    stress = 'stress'
    rate_form = true
    coefficients = '90000 0.3'
    coefficient_types = 'YOUNGS_MODULUS POISSONS_RATIO'
  []
  [stress_step]
    type = SR2BackwardEulerTimeIntegration
    variable = 'stress'
  []
  [plastic_step]
    type = ScalarBackwardEulerTimeIntegration
    variable = 'equivalent_plastic_strain'
  []
  [void_step]
    type = ScalarBackwardEulerTimeIntegration
    variable = 'void_fraction'
  []
  [residual]
    type = ComposedModel
    models = 'total_rate hardening surface direction viscosity plastic_rate hardening_rate growth elastic_rate hooke stress_step plastic_step void_step'
  []
  [guess]
    type = ConstantExtrapolationPredictor
    unknowns_SR2 = 'stress'
    unknowns_Scalar = 'equivalent_plastic_strain void_fraction'
  []
  [porous]
    type = ImplicitUpdate
    equation_system = 'balance'
    solver = 'newton'
    predictor = 'guess'
  []
[]

[EquationSystems]
  [balance]
    type = NonlinearSystem
    model = 'residual'
    unknowns = 'stress equivalent_plastic_strain void_fraction'
  []
[]

[Solvers]
  [newton]
    type = NewtonWithLineSearch
    linear_solver = 'lu'
    abs_tol = 1e-8
    rel_tol = 1e-10
    max_its = 60
    max_linesearch_iterations = 8
  []
  [lu]
    type = DenseLU
  []
[]
