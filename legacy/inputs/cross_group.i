# Three sites, each with a strain of its own, that swell together: one unknown per site and one for all of them.
#   site:    d(site)/dt   = pull - site - swelling(all)
#   all:     d(all)/dt    = feed - hardening(all) + trace of the mean site strain
# The sites are the first group of unknowns and are eliminated by a Schur complement.

[Settings]
  [example_batch_shape]
    site = '(2; 3)'
    site~1 = '(2; 3)'
    pull = '(2; 3)'
  []
[]

[Models]
  [swelling]
    type = ScalarToDiagonalSR2
    input = 'all'
    output = 'swell'
  []
  [site_flow]
    type = SR2LinearCombination
    from = 'pull site swell'
    weights = '1.0 -1.0 -1.0'
    to = 'site_rate'
  []
  [site_step]
    type = SR2BackwardEulerTimeIntegration
    variable = 'site'
  []
  [mean]
    type = SR2IntermediateMean
    from = 'site'
    to = 'mean_site'
    reduces = 'site'
  []
  [trace]
    type = SR2Invariant
    tensor = 'mean_site'
    invariant = 'trace'
    invariant_type = 'I1'
  []
  [hold]
    type = VoceIsotropicHardening
    equivalent_plastic_strain = 'all'
    isotropic_hardening = 'hold'
    saturated_hardening = '1.2'
    saturation_rate = '0.7'
  []
  [all_flow]
    type = ScalarLinearCombination
    from = 'feed hold trace'
    weights = '1.0 -1.0 1.0'
    to = 'all_rate'
  []
  [all_step]
    type = ScalarBackwardEulerTimeIntegration
    variable = 'all'
  []
  [residual]
    type = ComposedModel
    models = 'swelling site_flow site_step mean trace hold all_flow all_step'
  []
  [sites]
    type = ImplicitUpdate
    equation_system = 'balance'
    solver = 'newton'
  []
[]

[EquationSystems]
  [balance]
    type = NonlinearSystem
    model = 'residual'
    unknowns = 'site; all'
    structure = 'block dense'
  []
[]

[Solvers]
  [lu]
    type = DenseLU
  []
  [schur]
    type = SchurComplement
    residual_primary_group = 0
    unknown_primary_group = 0
    primary_solver = 'lu'
    schur_solver = 'lu'
  []
  [newton]
    type = Newton
    linear_solver = 'schur'
    abs_tol = 1e-13
    rel_tol = 1e-13
  []
[]
