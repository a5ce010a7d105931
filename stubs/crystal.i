# Plasticity of one face-centred cubic crystal with 12 slip systems, driven by the deformation rate and the spin.
# Stress in MPa, time in s, rates in 1/s.
#
# Unknowns: elastic_strain (6), orientation (3) and slip_hardening (1). The slip quantities (resolved shears,
# strengths, rates) live on a sub-batch axis of 12 inside the residual.

[Tensors]
  # 30 steps in 12 s, at two crystals of different orientation.
  [times]
    type = Python
    expr = 'Scalar(torch.linspace(0.0, 12.0, 31, dtype=torch.float64))'
  []
  [stretchings]
    type = Python
    expr = 'SR2(torch.tensor([8.0e-4, -4.0e-4, -4.0e-4, 0.0, 0.0, 2.0e-4], dtype=torch.float64).expand(31, 2, 6).contiguous())'
  []
  [spins]
    type = Python
    expr = 'WR2(torch.tensor([0.0, 0.0, 3.0e-4], dtype=torch.float64).expand(31, 2, 3).contiguous())'
  []
  [first_orientations]
    type = Python
    expr = 'MRP(torch.tensor([[0.0, 0.0, 0.0], [0.05, -0.12, 0.2]], dtype=torch.float64))'
  []
  [slip_vectors]
    type = Python
    expr = 'MillerIndex(torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64))'
  []
  [plane_normals]
    type = Python
    expr = 'MillerIndex(torch.tensor([[1.0, 1.0, 1.0]], dtype=torch.float64))'
  []
[]

[Drivers]
  [driver]
    type = TransientDriver
    model = 'crystal'
    prescribed_time = 'times'
    prescribed_SR2_names = 'stretching'
    prescribed_SR2_values = 'stretchings'
    prescribed_WR2_names = 'spin'
    prescribed_WR2_values = 'spins'
    ic_MRP_names = 'orientation'
    ic_MRP_values = 'first_orientations'
  []
[]

[Data]
  [lattice]
    type = CubicCrystal
    lattice_parameter = 1.0
    slip_directions = 'slip_vectors'
    slip_planes = 'plane_normals'
  []
[]

[Models]
  [rotation]
    type = RotationMatrix
    from = 'orientation'
    to = 'rotation'
  []
  [hooke]
    type = LinearIsotropicElasticity
    strain = 'elastic_strain'
    stress = 'stress'
    coefficients = '115000 0.34'
    coefficient_types = 'YOUNGS_MODULUS POISSONS_RATIO'
  []
  [shears]
    type = ResolvedShear
    stress = 'stress'
    orientation_matrix = 'rotation'
    resolved_shears = 'resolved_shears'
    crystal_geometry = 'lattice'
  []
  [strengths]
    type = SingleSlipStrengthMap
    slip_hardening = 'slip_hardening'
    slip_strengths = 'slip_strengths'
    constant_strength = 40
    crystal_geometry = 'lattice'
  []
  [slip]
    type = PowerLawSlipRule
    resolved_shears = 'resolved_shears'
    slip_strengths = 'slip_strengths'
    slip_rates = 'slip_rates'
    gamma0 = 1e-3
    n = 6
  []
  [total_slip]
    type = SumSlipRates
    slip_rates = 'slip_rates'
    sum_slip_rates = 'total_slip_rate'
  []
  [slip_hardening]
    type = VoceSingleSlipHardeningRule
    slip_hardening = 'slip_hardening'
    sum_slip_rates = 'total_slip_rate'
    slip_hardening_rate = 'slip_hardening_rate'
    initial_slope = 300
    saturated_hardening = 60
  []
  [plastic_stretching]
    type = PlasticDeformationRate
    orientation_matrix = 'rotation'
    slip_rates = 'slip_rates'
    plastic_deformation_rate = 'plastic_stretching'
    crystal_geometry = 'lattice'
  []
  [plastic_spin]
    type = PlasticVorticity
    orientation_matrix = 'rotation'
    slip_rates = 'slip_rates'
    plastic_vorticity = 'plastic_spin'
    crystal_geometry = 'lattice'
  []
  [elastic_rate]
    type = ElasticStrainRate
    elastic_strain = 'elastic_strain'
    deformation_rate = 'stretching'
    vorticity = 'spin'
    plastic_deformation_rate = 'plastic_stretching'
    elastic_strain_rate = 'elastic_strain_rate'
  []
  [lattice_spin]
    type = OrientationRate
    elastic_strain = 'elastic_strain'
    vorticity = 'spin'
    plastic_deformation_rate = 'plastic_stretching'
    plastic_vorticity = 'plastic_spin'
    orientation_rate = 'orientation_rate'
  []
  [strain_step]
    type = SR2BackwardEulerTimeIntegration
    variable = 'elastic_strain'
  []
  [hardening_step]
    type = ScalarBackwardEulerTimeIntegration
    variable = 'slip_hardening'
  []
  [orientation_step]
    type = WR2ImplicitExponentialTimeIntegration
    variable = 'orientation'
  []
  [residual]
    type = ComposedModel
    models = 'rotation hooke shears strengths slip total_slip slip_hardening plastic_stretching plastic_spin elastic_rate lattice_spin strain_step hardening_step orientation_step'
  []
  [guess]
    type = ConstantExtrapolationPredictor
    unknowns_SR2 = 'elastic_strain'
    unknowns_Scalar = 'slip_hardening'
    unknowns_MRP = 'orientation'
  []
  [crystal]
    type = ImplicitUpdate
    equation_system = 'lattice_balance'
    solver = 'newton'
    predictor = 'guess'
  []
[]

[EquationSystems]
  [lattice_balance]
    type = NonlinearSystem
    model = 'residual'
    unknowns = 'elastic_strain slip_hardening orientation'
  []
[]

[Solvers]
  [newton]
    type = NewtonWithLineSearch
    linear_solver = 'lu'
    abs_tol = 1e-10
    rel_tol = 1e-8
    max_its = 50
    max_linesearch_iterations = 6
  []
  [lu]
    type = DenseLU
  []
[]
