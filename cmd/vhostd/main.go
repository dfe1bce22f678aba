// Command vhostd is the host side of a virtual machine's network card: a vhost-user virtio-net back-end in one static program.
//
// # Theory of operation
//
// This directory turns a command line into parts made elsewhere and puts them together; it has no packet in its hands:
//
//	flags -> settings -> source   where front-ends come from (socket, descriptor, systemd)    vhostuser.Acceptor
//	                  -> device   what --net names                                            netdev.Device
//	                  -> backend.Backend.Serve until a signal
//	                  -> control socket (vhostd stats), metrics, sd_notify: readers of backend.Stats
//
// That is `vhostd run`. `vhostd serve` has many of it:
//
//	file -> config.Config -> settings of each port -> fleet of members, each a port that is served
//	SIGHUP, vhostd reload -> the file again -> config.Compare -> what is different is done, and nothing else touched
//
// Exit codes: 0 for a clean end (a signal included), 1 for a failure, 2 for a command line that cannot be understood.
package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

const (
	exitOK      = 0
	exitFailure = 1
	exitUsage   = 2
)

func main() { os.Exit(run(os.Args, os.Stdout, os.Stderr)) }

// run executes a command line, args[0] being the program's name, and returns the exit code.
func run(args []string, stdout, stderr io.Writer) int {
	root := newRoot()
	root.SetArgs(conventional(args))
	root.SetOut(stdout)
	root.SetErr(stderr)
	cmd, err := root.ExecuteC()
	if err == nil {
		return exitOK
	}
	fmt.Fprintf(stderr, "vhostd: %v\n", err)
	if usage := (*usageError)(nil); errors.As(err, &usage) {
		fmt.Fprintf(stderr, "Run '%s --help' for what it takes.\n", cmd.CommandPath())
		return exitUsage
	}
	return exitFailure
}

// conventional lets the program be found and started the way of the vhost-user "backend program conventions": under the name
// vhost-user-net, with the options alone. Then it is vhostd run.
func conventional(args []string) []string {
	if strings.HasPrefix(filepath.Base(args[0]), "vhost-user-") {
		return append([]string{"run"}, args[1:]...)
	}
	return args[1:]
}

// usageError is a command line that cannot be understood, as opposed to one that cannot be carried out.
type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

// usagef is fmt.Errorf for the command line's faults.
func usagef(format string, args ...any) error { return &usageError{fmt.Errorf(format, args...)} }
