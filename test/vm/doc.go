// Package vm holds the tests that need a whole virtual machine: a Linux guest in QEMU whose network card is vhostd.
//
// Each test starts the real vhostd program, a namespace with servers in it, and a guest, and then acts inside the guest
// step by step. It prints what it saw, so that the log of a run can be read as a report. Tests that decide themselves when a
// frame leaves the device (join) run the back-ends of two guests in their own process instead. The parts:
//
//	stream   the traffic: bytes that both ends can compute and check
//	rpc      the language between the test and the agent
//	agent    the program inside the guest
//	machine  boots a guest in QEMU
//	netlab   a network namespace with servers
//	daemon   starts vhostd and looks at it from outside
//	demo     what `make demo` shows
//
// The tests need root (for namespaces and tap devices) and what scripts/setup.sh brings; `make test` sees to it.
// VMTEST_BACKEND=qemu runs them with QEMU's own back-end instead of vhostd where that is possible: a test that fails
// there too is itself at fault. VMTEST_PACKED=1 gives every guest packed rings.
package vm
