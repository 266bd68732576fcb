# Every test of these rooms runs again as fake/ROOM/CONCEPT on the fake device: the same sources, with what they make
# without naming a device made there.
set(rooms_on_fake_device optim model state step run analysis models)

# What has no meaning there.
set(not_on_fake_device
    # Kernels and sums of the CPU alone.
    DividingOptimizer.LeavesTheGradientsUnchanged DividingOptimizer.HoldsNoGradient* Types/OnePass.*
    JointNorm.NeedsLittleMemory* JointNorm.IsSummedInFp64OverFortyMillion* Gatherer.SumsWeightGradientsInTheirProducts*
    Gpt.WithRmsNormsIsInFp32ThatOfDouble Gpt.UsesTheFusedBlock* Llama.UsesTheFusedBlockAndNorm
    # Autocast of the CPU.
    ExactNumbers.AreThoseOfTheOuterAutocast Llama.RunsUnderAutocast
    # Operators that the device lacks: recurrent layers, sparse and complex tensors, torch's repeat() with tensors of its own.
    ExactDropout.MayBeThatOfARecurrentLayer GradientKinds.ASparseOne* GradientKinds.AComplexLoss*
    Llama.IsTheNetworkOfThePapersWithItsGradient ExactPrograms.* Groups/EveryOptimizer.ARefusedGroup*
    Groups/EveryOptimizer.RefusesASparse*
    # They look at the CPU's generator, which is not drawn from.
    PartialBatches.AreNotInTheWayOfAnotherBatch* ForwardState.CanLeaveTheGenerators*
    # at::tensor() in a model makes a constant of the CPU.
    ExactInPlace.TakesNumbersThatTheModelMakes
    # Bytes without rounding; the device rounds to 512.
    NoTrace.LeavesNoTraceOfATorchOptimizer FusedOptimizer.KeepsNoStateForAParameterWithoutAGradient
    Prediction.PredictsThePeakOfMicroBatches* ExactOutOfMemory.LeavesNothingWhateverTheBudget
    GptRecompute.KeepsOneInputABlock
    # Snapshots of a device are in the host's memory: they take none of its own.
    Recovery.SnapshotsInMemoryAreReclaimed* Recovery.ASnapshotThatIsStillBeingWrittenDown*)

# Some minutes: every allocation of a step fails once.
set(long_on_fake_device step/transaction step/reclaimed_memory)

function(add_fake_device_test name target filter)
    list(JOIN not_on_fake_device ":" excluded)
    cmake_path(GET name PARENT_PATH room)
    if(NOT room IN_LIST rooms_on_fake_device)
        return()
    endif()
    add_test(NAME fake/${name} COMMAND ${target} --gtest_filter=${filter}-${excluded})
    set_tests_properties(fake/${name} PROPERTIES TIMEOUT ${longest_test} ENVIRONMENT MICROBATCH_TEST_DEVICE=fake:0)
    if(name IN_LIST long_on_fake_device)
        set_tests_properties(fake/${name} PROPERTIES LABELS long)
    endif()
endfunction()
