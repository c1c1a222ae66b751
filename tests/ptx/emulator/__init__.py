"""The PTX that Triton compiles, executed on a CPU with numpy: the third ladder of proof, after the interpreter and the
checks of the assembler's output.

    syntax       text as instructions and labels
    meaning      the table of instructions, each with the section of the PTX ISA that says what it does
    arithmetic, movement, synchronization, copying, products    its rows
    fragments    matrices in the registers of warps
    flow         basic blocks, and their order
    translate    blocks as Python functions on arrays [programs, threads]
    machine      programs side by side; turns: who executes which block when
    memory, shared    global memory between red zones, shared memory full of NaN
    races        vector clocks: who may touch shared memory when
    copies, bulk, barriers, groups    copies of threads and in bulk, mbarriers, products of four warps
    driver       in the place of the package's launch

What it finds: accesses beyond a tensor's elements or out of alignment; numbers that nobody wrote (they are NaN); races
on shared memory between warps, between lanes, and with asynchronous copies and products; reads and writes of what
another program of the launch wrote; copies that are not waited for, in whichever order they come; mbarriers with wrong
phases, arrivals or byte counts, uninitialized, or unfenced; missing proxy fences; registers of products of four warps
that are touched before the wait, or handed over without a fence; bulk copies that begin where none may; deadlocks;
parts of warps at instructions for whole ones; registers that no other warp has given back.

What is not modelled:

- Time, and with it speed.
- The assembler, and what comes after it: what runs is PTX, not SASS.
- A lane of a warp that writes what another one still reads. Only reads of what another lane has written need a
  `bar.warp.sync`, or a barrier, in between.
- Operands of such products without swizzle: refused, as is every instruction and form that is not in the table.
- Global memory's order within a launch: what one program has written no other may touch, but for additions, whose old
  values are NaN to whoever reads them.
- Clusters, and with them other programs' shared memory.
- That a bulk copy which overwrites what was read by ordinary loads may need a fence.
- In kernels without partitions, two fences that are asked for in the others, because Triton 3.7 itself leaves them out:
  the one between the initialization of an mbarrier and a bulk copy that completes on it, and `wgmma.fence` after the
  last write to a register that a product reads. There one has to come after the last wait for products.
- Arithmetic to the last bit: see `arithmetic` and `products`. TF32 operands are cut off to 19 bits, as the part does.
"""
