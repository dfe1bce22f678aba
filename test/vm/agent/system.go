//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/vhostd/vhostd/test/vm/rpc"
)

type none struct{}

// path is where the guest's programs are: u-root's, and those that the harness laid over them.
const path = "/bbin:/bin:/usr/bin:/usr/sbin:/sbin"

func execute(a rpc.ExecArgs) (rpc.ExecResult, error) {
	if len(a.Argv) == 0 {
		return rpc.ExecResult{}, errors.New("no program named")
	}
	ctx, cancel := context.WithTimeout(context.Background(), a.Timeout)
	defer cancel()
	os.Setenv("PATH", path)
	cmd := exec.CommandContext(ctx, a.Argv[0], a.Argv[1:]...)
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		return rpc.ExecResult{}, fmt.Errorf("%v: not done after %v: %s", a.Argv, a.Timeout, out)
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return rpc.ExecResult{}, err
	}
	return rpc.ExecResult{Output: string(out), Code: cmd.ProcessState.ExitCode()}, nil
}

func readFile(a rpc.FileArgs) (rpc.FileResult, error) {
	b, err := os.ReadFile(a.Path)
	return rpc.FileResult{Data: string(b)}, err
}

// writeFile writes in one call, as sysfs files want it, and never creates.
func writeFile(a rpc.FileArgs) (none, error) {
	f, err := os.OpenFile(a.Path, os.O_WRONLY, 0)
	if err != nil {
		return none{}, err
	}
	_, err = f.WriteString(a.Data)
	return none{}, errors.Join(err, f.Close())
}

func glob(a rpc.FileArgs) (rpc.GlobResult, error) {
	paths, err := filepath.Glob(a.Path)
	return rpc.GlobResult{Paths: paths}, err
}

// holdMemory touches every page, so that what the kernel allocates from now on comes from other memory.
func (a *agent) holdMemory(h rpc.HoldArgs) (none, error) {
	a.hold = nil
	for range h.MiB {
		b := make([]byte, 1<<20)
		for i := 0; i < len(b); i += 4096 {
			b[i] = byte(i >> 12)
		}
		a.hold = append(a.hold, b)
	}
	return none{}, nil
}
