"""The rows that tests prove: in one process, on one GPU and on several."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import dedent

from .fault import Expected, Fault, Place

# A row: the name, the hazard if any, the expected outcome, and the fault; below it, its tests by
# the names of their functions without "test_", in the module that is named first.
CPU = """
    scratch-poisoned | H2 | REFUSED | scratch that is not zero: check() names it, reset() mends it
        scratch: scratch_that_is_not_zero_is_found_named_and_reset
    weight-moved | H3 | REFUSED | a bound tensor that moved (.data)
        scratch: a_bound_tensor_that_moved_is_refused
        scratch: a_weight_that_moved_is_refused_through_its_view
    weight-freed | H3 | RIGHT | a bound tensor whose owner let go of it
        scratch: the_memory_that_was_bound_is_kept
    weight-swapped | H2 | RIGHT | weights swapped, then reset()
        scratch: after_reset_every_launch_has_the_new_addresses
        scratch: private_copies_are_taken_again_where_they_lie
    weight-resized | H3 | REFUSED | weights of another shape, then reset()
        scratch: reset_refuses_what_is_another_layer
    weight-modified | H3 | REFUSED | a copied weight modified in place
        router: modified_weights_are_refused_only_where_they_were_copied
    router-dropped | H6 | RIGHT | a Router dropped while a graph holds its calls
        scratch: a_graph_keeps_the_tensors_of_a_dropped_router
        scratch: a_private_copy_lives_as_long_as_a_graph_that_reads_it
    copy-dropped-captured | H6 | RIGHT | a copy dropped under capture
        scratch: a_copy_dropped_under_capture_is_freed_afterwards
    captures-piecewise | H5 | LEAVES_ZERO | piecewise graphs: no memset, bounded scratch
        scratch: piecewise_graphs_hold_no_memset_and_little_scratch
    captures-without-scratch | H5 | RIGHT | captures of kernels that use no scratch
        scratch: captures_that_use_no_zeroed_scratch_take_none
    graph-destroyed | H5 | RIGHT | a graph that is destroyed gives its slot back
        scratch: a_slot_returns_when_its_graph_is_gone
        scratch: scratch_of_graphs_that_are_gone_is_taken_before_new
    graphs-without-end | H5 | RIGHT | graphs captured and destroyed without end
        scratch: graphs_that_are_gone_do_not_pile_up
    no-memory-captured | H5 | REFUSED | no memory left under capture
        scratch: no_memory_under_capture_is_an_error_in_words
    capture-invalidated | H11 | REFUSED | a capture that was invalidated
        scratch: an_invalidated_capture_is_an_error_in_words
    capture-elsewhere | H11 | RIGHT | a bind and a first call during another thread's capture
        scratch: a_bind_and_a_first_call_leave_a_capture_in_another_thread_alone
    streams-10000 | H8 | RIGHT | 10,000 streams
        scratch: ten_thousand_streams_do_not_keep_ten_thousand_slots
        scratch: streams_with_work_under_way_keep_their_slots
    stream-handle-reused | H8 | RIGHT | a stream with the handle of one that is gone
        scratch: a_stream_that_has_anothers_handle_has_scratch_of_its_own
    thread-id-reused | H8 | RIGHT | a thread with the identifier of one that is gone
        scratch: a_thread_that_has_anothers_identifier_has_scratch_of_its_own
    interrupted-anywhere |  | RIGHT | Ctrl-C at every line of a call
        faults_runtime: an_interrupt_at_any_line_of_a_call_leaves_the_next_call_right
        faults_runtime: an_interrupt_while_a_stream_gets_its_scratch_leaves_that_to_the_next_call
        faults_runtime: an_interrupt_while_a_slot_changes_its_stream_leaves_both_streams_usable
        faults_runtime: an_interrupt_while_a_graph_is_captured_leaves_no_scratch_to_two_graphs
        faults_runtime: an_interrupt_that_is_being_handled_holds_no_lock
        faults_runtime: an_interrupt_of_a_reset_lets_no_graph_lose_the_layers_tensors
        faults_runtime: a_launch_whose_end_is_not_recorded_keeps_its_scratch
    handler-anywhere |  | RIGHT | a signal handler that routes or binds, at every line
        faults_runtime: a_signal_handler_that_routes_at_any_line_gets_no_scratch_of_the_call_there
        faults_runtime: a_signal_handler_that_routes_on_a_new_stream_gets_no_scratch_in_use
        faults_runtime: a_signal_handler_that_binds_at_any_line_of_a_bind_is_served
        router: a_dispatch_within_a_dispatch_that_binds_is_refused
        router: a_call_within_a_call_of_the_same_thread_is_refused
    first-use-twice |  | RIGHT | first use by two threads, 1,000 seeds
        faults_runtime: first_use_by_two_threads
    forked | H11 | REFUSED | a call in a forked child
        driver_faults: TestFork
    forked-exit | H11 | RIGHT | the exit of a forked child
        scratch: a_forked_child_frees_nothing
    driver-call-fails | H11 | REFUSED | the n-th driver call fails, for all n and 14 codes
        driver_faults: each_call_in_turn_fails
    driver-entry-missing | H11 | REFUSED | a driver without an entry point, each in turn
        driver_faults: each_function_in_turn_is_missing
    driver-too-old | H11 | REFUSED | a driver without tensor maps
        driver_faults: a_driver_without_tensor_maps_is_refused_before_a_null_call
    context-foreign | H11 | REFUSED | another context is current
        driver_faults: a_foreign_context_is_refused_before_anything_is_launched
    context-kept | H11 | RIGHT | the caller's contexts, after a call or a bind that fails
        driver_faults: the_callers_contexts_are_as_before
        driver_faults: a_bind_that_fails_leaves_the_callers_context
    context-lost | H11 | REFUSED | an earlier kernel lost the context
        driver_faults: a_lost_context_is_not_blamed_on_this_launch
        driver_faults: a_reset_context_asks_for_a_restart
    no-room-for-cluster | H4 | FALLBACK | a context without room for a cluster
        driver_faults: TestWithoutRoomForACluster
    manifest-bytes | H7 | REFUSED | every class of byte of manifest and records changed
        fuzz: a_share_of_the_mutations_gives_an_answer_or_an_error
    cubin-truncated | H7 | REFUSED | a cubin cut short, or one bit flipped
        artifacts: truncated_cubin
        artifacts: one_flipped_bit
        artifacts: every_digit_of_the_hash_counts
    cubin-swapped | H7 | REFUSED | the bytes of another architecture under a right hash
        artifacts: wrong_architecture_under_a_right_hash
    file-special | H7 | REFUSED | a FIFO, device, folder, loop or sparse file
        files: a_cubin_that_is_no_small_regular_file
        files: a_manifest_that_is_no_small_regular_file
    file-swapped | H7 | REFUSED | a file swapped for a FIFO before it is opened
        files: a_file_swapped_for_a_fifo_before_it_is_opened
    set-mixed | H7 | RIGHT | a set swapped under a reader
        artifacts: a_set_swapped_under_a_reader_is_opened_whole
        artifacts: no_reader_ever_sees_a_mixed_set
    set-squatted | H7 | REFUSED | an artifacts folder of another package
        artifacts: the_artifacts_of_another_package_are_not_ours
    publish-call-fails | H7 | RIGHT | the n-th system call of a publish fails, for all n
        publish_faults: each_call_fails
    publish-killed | H7 | RIGHT | a publish killed at every system call
        publish_faults: each_call_is_the_last
"""
GPU = """
    gpu-padding-torn | H1 | WRONG_ROW_ONLY | padding_mask rewritten during 10^6 launches
        gpu_faults: an_input_that_is_rewritten_all_the_while[padding_mask-8]
        gpu_faults: an_input_that_is_rewritten_all_the_while[padding_mask-64]
    gpu-image-torn | H1 | WRONG_ROW_ONLY | image_mask rewritten during 10^6 launches
        gpu_faults: an_input_that_is_rewritten_all_the_while[image_mask-8]
        gpu_faults: an_input_that_is_rewritten_all_the_while[image_mask-64]
    gpu-count-torn | H1 | WRONG_ROW_ONLY | num_tokens rewritten during 10^6 launches
        gpu_faults: an_input_that_is_rewritten_all_the_while[num_tokens-8]
        gpu_faults: an_input_that_is_rewritten_all_the_while[num_tokens-64]
    gpu-count-negative | H1 | WRONG_ROW_ONLY | num_tokens rewritten, to 0 and -1 too
        gpu_faults: an_input_that_is_rewritten_all_the_while[num_tokens_negative-8]
        gpu_faults: an_input_that_is_rewritten_all_the_while[num_tokens_negative-64]
    gpu-token-id-torn | H1 | WRONG_ROW_ONLY | input_ids rewritten during 10^6 launches
        gpu_faults: an_input_that_is_rewritten_all_the_while[input_ids-8]
        gpu_faults: an_input_that_is_rewritten_all_the_while[input_ids-64]
    gpu-launch-on-residue | H2 | ENDS | a launch on scratch that is not zero
        gpu_faults: a_launch_on_scratch_that_is_not_zero
    gpu-scratch-poisoned | H2 | REFUSED | scratch that is not zero: check() and reset()
        gpu_memory: scratch_that_is_not_zero_is_found_and_reset
    gpu-scratch-own | H2 | LEAVES_ZERO | torch's pool emptied and refilled
        gpu_memory: no_memory_that_lasts_is_torchs
    gpu-weight-moved | H3 | REFUSED | weights that moved
        gpu_memory: weights_that_moved_are_refused_and_bound_by_reset
    gpu-green-contexts | H4 | FALLBACK | green contexts of 8 to 128 SMs
        gpu_contexts: green_contexts_are_right_and_say_what_did_not_fit
    gpu-captures | H5 | LEAVES_ZERO | piecewise graphs: no memset, bounded scratch
        gpu_memory: piecewise_graphs_hold_launches_alone_and_little_scratch
    gpu-graphs-destroyed | H5 | LEAVES_ZERO | 200 graphs destroyed at random
        gpu_faults: graphs_that_are_destroyed_at_random
    gpu-graph-destroyed-running | H5 | LEAVES_ZERO | a graph destroyed while it runs
        gpu_memory: a_slot_stays_with_a_graph_that_is_destroyed_while_it_runs
    gpu-two-parents | H5 | LEAVES_ZERO | one graph in two parents
        gpu_faults: one_graph_in_two_parents
    gpu-router-dropped | H6 | RIGHT | a Router dropped while a graph holds its calls
        gpu_memory: a_graph_is_right_after_its_router_was_dropped
        gpu_memory: dropped_routers_leave_no_memory_behind
    gpu-streams | H8 | RIGHT | streams without end, with work pending
        gpu_memory: foreign_streams_without_end
    gpu-ids-reused | H8 | RIGHT | handles of streams and threads used again
        gpu_memory: ids_tell_streams_and_threads_apart
    gpu-spinner | H9 | LEAVES_ZERO | a neighbour on k SMs, k = 0 .. all
        gpu_faults: a_neighbour_on_any_number_of_sms
    gpu-pdl-chain | H10 | LEAVES_ZERO | a kernel that never waits, then a call; pdl is not tried
        gpu_faults: a_chain_with_a_kernel_that_never_waits
    gpu-context-lost | H11 | REFUSED | an illegal access elsewhere, then a call
        gpu_contexts: after_a_failed_kernel_a_call_says_to_restart
    gpu-context-reset | H11 | REFUSED | the context reset, then a call
        gpu_contexts: after_a_reset_a_call_says_to_restart
    gpu-context-foreign | H11 | REFUSED | a context of the caller's
        gpu_contexts: a_context_of_the_caller_is_refused_and_kept
        gpu_contexts: a_thread_without_a_context_gets_no_other_than_torchs
    gpu-capture-elsewhere | H11 | RIGHT | a bind and a first call during another thread's capture
        gpu_memory: a_bind_and_a_first_call_leave_another_threads_global_capture_alone
    gpu-no-memory |  | REFUSED | no memory left
        gpu_memory: memory_is_refused_in_words_and_the_next_call_is_right
    gpu-soak |  | LEAVES_ZERO | 8 threads on 4 streams each, eager and graphs: memory stays flat
        gpu_faults: threads_and_streams_and_graphs_for_a_while
    gpu-empty-cache |  | LEAVES_ZERO | torch's cache emptied between calls, expandable segments too
        gpu_faults: empty_cache_between
    gpu-nan |  | LEAVES_ZERO | NaN in all weights, biases and rows
        gpu_faults: nan_everywhere
    gpu-killed |  | RIGHT | a process killed in the middle of a launch
        gpu_faults: a_process_that_is_killed_in_the_middle_of_a_launch
    gpu-two-processes |  | LEAVES_ZERO | two processes on one GPU
        gpu_faults: two_processes_at_once
    gpu-million |  | RIGHT | 2^20 tokens, outputs of 4 GiB
        gpu_faults: a_million_tokens
    gpu-sanitizer |  | LEAVES_ZERO | compute-sanitizer, four tools
        gpu_faults: compute_sanitizer
"""
GPUS = """
    gpus-current-device | H11 | RIGHT | another GPU is current
        gpus: a_call_runs_on_its_layers_gpu_whatever_the_current_one
    gpus-foreign-tensors | H11 | REFUSED | tensors of another GPU
        gpus: tensors_of_another_gpu_are_refused
    gpus-threads | H8 | RIGHT | a thread for each GPU
        gpus: a_thread_for_each_gpu
    gpus-graphs | H5 | LEAVES_ZERO | a graph of one GPU while the others work
        gpus: a_graph_of_one_gpu_while_the_others_work
    gpus-reset | H2 | LEAVES_ZERO | scratch poisoned and reset on one GPU
        gpus: a_reset_of_one_gpu_leaves_the_others
    gpus-dropped | H6 | RIGHT | a layer dropped on one GPU
        gpus: a_layer_dropped_on_one_gpu_leaves_the_others
    gpus-reordered | H11 | RIGHT | CUDA_VISIBLE_DEVICES in another order
        gpus: gpus_in_another_order
    gpus-nccl-beside | H9 | LEAVES_ZERO | an NCCL all-reduce loop beside the routers of a graph
        gpus: routers_with_all_reduces[beside-1]
        gpus: routers_with_all_reduces[beside-64]
    gpus-nccl-between | H5 | LEAVES_ZERO | NCCL all-reduces between the routers of a graph
        gpus: routers_with_all_reduces[between-1]
        gpus: routers_with_all_reduces[between-64]
    gpus-doctor |  | RIGHT | doctor on all GPUs and on each
        gpus: doctor_gives_each_gpu_its_block
        gpus: doctor_tests_the_gpu_that_is_named
"""


def faults(text: str, place: Place) -> Iterator[Fault]:
    """Read the rows of a machine."""
    row: list[str] = []
    tests: list[str] = []
    for line in [*dedent(text).strip().splitlines(), ""]:
        if line.startswith(" "):
            module, _, name = line.strip().partition(": ")
            # The name of a class stands for all of its tests.
            tests.append(f"tests/test_{module}.py::{name if name[0].isupper() else 'test_' + name}")
            continue
        if row:
            name, hazard, expected, what = row
            yield Fault(
                name=name,
                hazard=hazard,
                what=what,
                place=place,
                expected=Expected[expected],
                tests=tuple(tests),
            )
        row, tests = [part.strip() for part in line.split("|")], []


TESTED = (
    *faults(CPU, Place.CPU),
    *faults(GPU, Place.GPU),
    *faults(GPUS, Place.GPUS),
)
